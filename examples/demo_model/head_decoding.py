"""Does a head that detects better decode better? Heads of the study, the shipped one and an oracle, on the demo model.

    python examples/demo_model/head_decoding.py --heads shipped base-s0 layers-2-s0 oracle

The *oracle* gives every token the exact checker's verdict: what is left to gain by judging tokens better, with the
same rules of decoding. Heads are those that `head_study.py` has saved in `<work_dir>/heads`. A stopped run goes on.
"""

from __future__ import annotations

import argparse
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from comparison import VALIDATION_SEED
from solve import faster_dtype, solve
from systems import MODELS, SYSTEMS
from train import ROOT
from transformers import AutoModel, AutoTokenizer
from transformers.utils import logging
from word_problems import MAX_RESPONSE_LENGTH, AnswerChecker, draw_problems, parse_prompt

import dsc_hf  # noqa: F401  (registers the Auto classes)
from dsc_hf.evaluation.request_log import RequestLog, key_of, weights_key

ORACLE_THRESHOLDS = (0.5,)


def make_oracle(model, tokenizer) -> None:
    """Let the exact checker judge in place of the model's head."""
    checker = AnswerChecker(tokenizer)
    checker.valid_answers = lru_cache(512)(checker.valid_answers)

    def score(ids, logits, hidden_states, attention_mask=None, position_ids=None) -> torch.Tensor:
        """Logits for *correct*, `(B, L)`: 8 or -8."""
        result = torch.full(ids.shape, 8.0)
        for row, text in enumerate(ids.tolist()):
            prompt = [token for token, real in zip(text, attention_mask[row].tolist(), strict=True) if real]
            problem = parse_prompt(tokenizer.decode(prompt[:-MAX_RESPONSE_LENGTH]))
            wrong = checker.wrong_tokens(problem, text[-MAX_RESPONSE_LENGTH:])
            result[row, -MAX_RESPONSE_LENGTH:] -= 16.0 * torch.from_numpy(np.asarray(wrong)).float()
        return result

    model.score = score


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heads", nargs="+", default=["shipped", "oracle"], metavar="NAME")
    parser.add_argument("--tokens_per_step", type=int, nargs="+", default=[3, 4, 5])
    parser.add_argument("--thresholds", type=float, nargs="+", default=[0.05, 0.15, 0.35, 0.5])
    parser.add_argument("--max_remasks_per_position", type=int, default=2)
    parser.add_argument("--problems", type=int, default=200, help="of the validation split")
    parser.add_argument("--work_dir", type=Path, default=ROOT / "build" / "head_study")
    args = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer, dtype = AutoTokenizer.from_pretrained(MODELS["dsc"]), faster_dtype()
    problems = draw_problems(args.problems, VALIDATION_SEED, "validation")
    journal = RequestLog(args.work_dir, name="decoding")
    print("| head | k | threshold | accuracy (%) | whole reasoning (%) | passes | remasks |\n" + "|---" * 7 + "|")
    for name in args.heads:
        folder = MODELS["dsc"] if name in ("shipped", "oracle") else args.work_dir / "heads" / name
        model = AutoModel.from_pretrained(folder, dtype=dtype, head_dtype=dtype).eval()
        weights = [name == "oracle", weights_key(model.correction_head), weights_key(model.backbone)]
        if name == "oracle":
            make_oracle(model, tokenizer)
        thresholds = ORACLE_THRESHOLDS if name == "oracle" else args.thresholds
        for k in logging.tqdm(args.tokens_per_step, desc=name):
            for threshold in thresholds:
                settings = {**SYSTEMS["dsc"].arguments, "tokens_per_step": k, "remask_threshold": threshold}
                settings["max_remasks_per_position"] = args.max_remasks_per_position
                key = key_of(weights, settings, args.problems)
                if key not in journal:
                    solved = solve(model, tokenizer, problems, batch_size=50, **settings)
                    journal.append([{"key": key, "head": name, **solved.summary()}])
                row = journal[key]
                print(
                    f"| {name} | {k} | {threshold} | {100 * row['accuracy']:.1f} ± {100 * row['standard_error']:.1f} "
                    f"| {100 * row['reasoning_accuracy']:.1f} | {row['forward_passes']:.2f} | {row['remasks']:.2f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
