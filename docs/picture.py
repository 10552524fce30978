"""Draw the picture of the README from what ``nla-llm run`` has left in ``results/``."""

from pathlib import Path

from nla_llm.report.figures import draw
from nla_llm.study import DEFAULT_PATH, Store, catalogue, summarise

if __name__ == "__main__":
    study = catalogue.load("attention_error")
    with Store(DEFAULT_PATH, create=False) as store:
        records = summarise(study, store, judge=False).records
    (picture,) = draw(study.figures(records)[:1])
    Path("docs/attention_error.svg").write_text(picture.svg, encoding="utf-8")
