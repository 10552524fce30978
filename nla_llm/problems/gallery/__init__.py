"""Made-up problems of which something is known in closed form. Same seed, same problem.

Everything is drawn in float64 and rounded to ``dtype`` at the end, so problems of one seed in two precisions are the
same problem. Arrays are NumPy's; for another library use ``problem.map``.
"""

from nla_llm.problems.gallery.attention import (
    clusters,
    gaussian,
    low_rank_logits,
    prescribed_logit_spectrum,
    shifted_mean,
    unequal_key_norms,
)
from nla_llm.problems.gallery.updates import (
    exponential_update,
    low_rank_plus_noise_update,
    power_law_update,
    prescribed_spectrum_update,
    spiked_update,
)

__all__ = [
    "clusters",
    "exponential_update",
    "gaussian",
    "low_rank_logits",
    "low_rank_plus_noise_update",
    "power_law_update",
    "prescribed_logit_spectrum",
    "prescribed_spectrum_update",
    "shifted_mean",
    "spiked_update",
    "unequal_key_norms",
]
