"""Which fine-tunings there are, from which model they start, and what they have in common."""

from dataclasses import dataclass
from pathlib import Path

from lora import add_adapters, freeze_all_but_linear_maps
from model import LanguageModel, load_model
from train import Options

from nla_llm.problems.embedded import embedded_directory

BASE = embedded_directory()
RANKS, SEEDS, ALPHA = (1, 2, 4, 8, 16), (0, 1), 4.0
OPTIONS = Options(
    steps=512,
    warmup=0.05,
    weight_decay=0.0,
    batch_tokens=1024,
    context=256,
    short_context=256,
    evaluate_every=128,
    checkpoint_every=128,
)


@dataclass(frozen=True)
class Run:
    """One fine-tuning; rank 0 is the full one. The seed draws the text, and the first A of LoRA."""

    rank: int
    seed: int

    @property
    def name(self) -> str:
        """Name on the command line, of files and in the record."""
        return f"lora-{self.rank}-{self.seed}" if self.rank else f"full-{self.seed}"

    def model(self, base: Path = BASE) -> LanguageModel:
        """Return the base model, ready to be trained."""
        model = load_model(base)
        if self.rank == 0:
            return freeze_all_but_linear_maps(model)
        return add_adapters(model, self.rank, ALPHA, self.seed)


RUNS = {run.name: run for seed in SEEDS for rank in (0, *RANKS) for run in [Run(rank, seed)]}
