from . import backend as backend
from . import costs as costs
from . import linalg as linalg
from . import measures as measures
from . import methods as methods
from . import operators as operators
from . import problems as problems
from . import report as report
from . import study as study
from . import testing as testing
from . import theory as theory
from .methods import Method as Method
from .methods import Properties as Properties
from .methods import Unsupported as Unsupported
from .methods import method as method
from .methods import register as register
from .problems import AttentionProblem as AttentionProblem
from .problems import UpdateProblem as UpdateProblem

__version__: str
