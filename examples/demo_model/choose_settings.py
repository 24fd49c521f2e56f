"""Choose thresholds on validation problems, for each number of tokens a step, and store them beside the head.

    python examples/demo_model/choose_settings.py --model model_cards/word-problems-dsc

The problems have numbers that occur in neither the training nor the test split.
"""

from __future__ import annotations

import argparse
import itertools
import json
from pathlib import Path

from solve import set_threads, solve
from transformers import AutoModel, AutoTokenizer
from transformers.utils import logging
from word_problems import draw_problems

import dsc_hf  # noqa: F401  (registers the Auto classes)

THRESHOLDS = {"visible": (0.5, 0.65, 0.8, 0.9, 0.95), "head": (0.05, 0.1, 0.15, 0.3, 0.5)}
MAX_PER_POSITION = (1, 2)


def best_row(rows: list[dict], score: str, k: int) -> dict:
    """The best setting of a score at `k` tokens a step: accuracy of the number and of the whole reasoning, less a
    point for each further forward pass."""
    own = [r for r in rows if (r["settings"]["remasking_score"], r["settings"]["tokens_per_step"]) == (score, k)]
    return max(own, key=lambda r: r["accuracy"] + r["reasoning_accuracy"] - 0.01 * r["forward_passes"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=Path("model_cards/word-problems-dsc"))
    parser.add_argument("--problems", type=int, default=200)
    parser.add_argument("--seed", type=int, default=100)
    parser.add_argument("--tokens_per_step", type=int, nargs="+", default=[2, 3, 4, 5])
    args = parser.parse_args()
    set_threads()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModel.from_pretrained(args.model)
    problems = draw_problems(args.problems, args.seed, "validation")
    rows = []
    bar = logging.tqdm(total=sum(map(len, THRESHOLDS.values())) * len(MAX_PER_POSITION) * len(args.tokens_per_step))
    for score, k, cap in itertools.product(THRESHOLDS, args.tokens_per_step, MAX_PER_POSITION):
        for threshold in THRESHOLDS[score]:
            settings = {
                "tokens_per_step": k,
                "remasking_score": score,
                "remask_threshold": threshold,
                "max_remasks_per_position": cap,
                "max_remasks_per_block": 48,
                "remask_scope": "generated",
            }
            summary = solve(model, tokenizer, problems, **settings).summary()
            rows.append({"settings": settings, **{name: summary[name] for name in summary if name != "ms"}})
            bar.update(1)
    bar.close()
    chosen: dict[str, dict[str, dict]] = {}
    for score, k in itertools.product(THRESHOLDS, args.tokens_per_step):
        best = best_row(rows, score, k)
        chosen.setdefault(score, {})[str(k)] = best["settings"]
        print(score, k, best)
    result = {"chosen": chosen, "problems": args.problems, "seed": args.seed, "split": "validation", "rows": rows}
    (args.model / "decoding_settings.json").write_text(json.dumps(result, indent=1) + "\n")
    model.generation_config.update(**chosen["head"].get("3", {}))
    model.generation_config.save_pretrained(args.model)


if __name__ == "__main__":
    main()
