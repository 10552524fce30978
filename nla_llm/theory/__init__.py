"""What is promised: closed forms, bounds and first-order predictions, each checked by something independent of it."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
