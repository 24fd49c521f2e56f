"""What the decode loop costs over the bare backbone forwards that it makes.

    make bench

Runs `generate()` on the demo model and, for comparison, the same number of backbone forwards on the same canvas, in
one process, in alternating order; prints medians and ratios. Absolute times mean nothing on a shared machine.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import torch
from transformers import AutoModel, AutoTokenizer

import dsc_hf  # noqa: F401  (registers the Auto classes)

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "examples" / "demo_model"))

from solve import generate_batch  # noqa: E402
from word_problems import MAX_RESPONSE_LENGTH, draw_problems  # noqa: E402


def bare_forwards(model, tokenizer, problems, passes: int) -> None:
    """So many forwards of the backbone alone, on a canvas of the same shape."""
    inputs = tokenizer([p.prompt for p in problems], return_tensors="pt", padding=True)
    grow = (0, MAX_RESPONSE_LENGTH)
    ids = torch.nn.functional.pad(inputs.input_ids, grow, value=model.config.mask_token_id)
    mask = torch.nn.functional.pad(inputs.attention_mask, grow, value=1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        for _ in range(passes):
            model.backbone(input_ids=ids, attention_mask=mask, position_ids=positions)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "model_cards" / "word-problems-dsc")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModel.from_pretrained(args.model)
    model.generation_config.eos_token_id = []  # every row runs to the end: the work is the same in each round
    problems = draw_problems(args.batch_size, 7, "validation")
    result = {}
    for score in ("none", "visible", "head"):
        settings = {"tokens_per_step": 3, "remasking_score": score, "remask_threshold": 0.999}
        passes = int(generate_batch(model, tokenizer, problems, **settings)[0].forward_passes.max())
        ratios = []
        for round_ in range(args.rounds):
            times = {}
            for name in ("loop", "bare") if round_ % 2 else ("bare", "loop"):
                began = time.perf_counter()
                if name == "loop":
                    generate_batch(model, tokenizer, problems, **settings)
                else:
                    bare_forwards(model, tokenizer, problems, passes)
                times[name] = time.perf_counter() - began
            ratios.append(times["loop"] / times["bare"])
        result[score] = {"median_ratio": statistics.median(ratios), "ratios": ratios, "passes": passes}
        print(f"{score:<8} {passes:>3} passes, generate() / bare forwards: {statistics.median(ratios):.3f}")
    (ROOT / "build").mkdir(exist_ok=True)
    (ROOT / "build" / "decode_overhead.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
