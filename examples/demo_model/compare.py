"""Compare the head with the training-free visible score on the same problems: paired differences.

python examples/demo_model/compare.py --problems 1000 --seed 2 --speed 3
python examples/demo_model/compare.py --problems 1000 --seed 2 --speed "1.0 nats"
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
from solve import faster_dtype, set_threads, solve
from transformers import AutoModel, AutoTokenizer
from word_problems import draw_problems

import dsc_hf  # noqa: F401  (registers the Auto classes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("model_cards/word-problems-dsc"))
    parser.add_argument("--problems", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=2)
    parser.add_argument(
        "--speed", default="3", help="as in decoding_settings.json: tokens a step, or an entropy bound"
    )
    args = parser.parse_args()
    set_threads()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    dtype = faster_dtype()
    model = AutoModel.from_pretrained(args.model, dtype=dtype, head_dtype=dtype)
    chosen = json.loads((args.model / "decoding_settings.json").read_text())["chosen"]
    problems = draw_problems(args.problems, args.seed, "test")
    results = {score: solve(model, tokenizer, problems, **chosen[score][args.speed]) for score in ("head", "visible")}
    for score, result in results.items():
        print(score, result.summary())
    for name in ("right", "valid"):
        difference = getattr(results["head"], name).astype(float) - getattr(results["visible"], name)
        error = difference.std() / np.sqrt(len(difference))
        print(f"{name}: head - visible = {100 * difference.mean():.1f} ± {100 * error:.1f} points")


if __name__ == "__main__":
    main()
