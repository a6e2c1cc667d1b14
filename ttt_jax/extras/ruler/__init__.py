"""Makes and scores RULER (Hsieh et al., 2024, arXiv 2404.06654): thirteen tasks at any length.

Texts, needles and their order are those of the lm-evaluation-harness; the random draws are not, and no file
is downloaded. The model's own tokenizer measures the length of a document.
"""

from ttt_jax.extras.ruler.generate import Ruler as Ruler
from ttt_jax.extras.ruler.sample import Sample as Sample
from ttt_jax.extras.ruler.sample import string_match_all as string_match_all
from ttt_jax.extras.ruler.sample import string_match_part as string_match_part
from ttt_jax.extras.ruler.tasks import TASKS as TASKS

__all__ = ["TASKS", "Ruler", "Sample", "string_match_all", "string_match_part"]
