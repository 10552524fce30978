"""Records become figures, and figures, tables and claims become a PDF.

`build` writes the report of one study, `build_summary` the page that sums up all studies of a run; `style` is what the
figures of studies draw with.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
