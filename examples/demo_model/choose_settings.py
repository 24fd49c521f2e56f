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
VERIFY_BLOCK = (False, True)


def best_row(rows: list[dict], score: str, k: int) -> dict:
    """The best setting of a score at `k` tokens a step, of those that need at most `60 / k` forward passes (at k = 3
    half of plain decoding at k = 1): accuracy of the number and of the reasoning, less a point for each pass."""
    own = [r for r in rows if (r["settings"]["remasking_score"], r["settings"]["tokens_per_step"]) == (score, k)]
    cheap = [r for r in own if r["forward_passes"] <= 60 / k] or own
    return max(cheap, key=lambda r: r["accuracy"] + r["reasoning_accuracy"] - 0.01 * r["forward_passes"])


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
    grid = [
        (score, k, cap, verify, threshold)
        for score, k, cap, verify in itertools.product(
            THRESHOLDS, args.tokens_per_step, MAX_PER_POSITION, VERIFY_BLOCK
        )
        for threshold in THRESHOLDS[score]
    ]
    for score, k, cap, verify, threshold in logging.tqdm(grid):
        settings = {
            "tokens_per_step": k,
            "remasking_score": score,
            "remask_threshold": threshold,
            "max_remasks_per_position": cap,
            "max_remasks_per_block": 48,
            "remask_scope": "generated",
            "verify_block": verify,
        }
        summary = solve(model, tokenizer, problems, **settings).summary()
        rows.append({"settings": settings, **{name: summary[name] for name in summary if name != "ms"}})
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
