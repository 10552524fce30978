from . import checkpoint as checkpoint
from . import embedded as embedded
from . import gallery as gallery
from . import llama as llama
from .problem import AttentionProblem as AttentionProblem
from .problem import UpdateProblem as UpdateProblem
