"""Leave-many-out probabilities: each is the backbone's at a masked place, averaged over the draws that masked it."""

import torch

from dsc_hf.training import leave_many_out_probabilities

MASK, VOCABULARY = 2, 9


def recorder():
    """A predictor that favours token `number of masks in the row`, and what it was asked."""
    asked = []

    def predict(ids, places):
        asked.append((ids.clone(), places))
        masks = (ids == MASK).sum(1)[places[0]]
        return torch.nn.functional.one_hot(masks.clamp(max=VOCABULARY - 1), VOCABULARY).float() * 3

    return predict, asked


def expected(ids, asked):
    """Probabilities by a loop over draws and tokens."""
    total, count = torch.zeros(ids.shape), torch.zeros(ids.shape)
    for masked, places in asked:
        for row, column in zip(*(index.tolist() for index in places), strict=True):
            logits = torch.zeros(VOCABULARY)
            logits[min(int((masked[row] == MASK).sum()), VOCABULARY - 1)] = 3
            logits[MASK] = -torch.inf
            total[row, column] += logits.softmax(0)[ids[row, column]]
            count[row, column] += 1
    return total / count.clamp(min=1), count > 0


def test_probabilities_are_those_of_the_masked_texts():
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, VOCABULARY, (5, 8), generator=generator)
    ids[:, 6] = MASK
    response = torch.arange(8)[None].expand(5, -1) >= 3
    predict, asked = recorder()
    found, known = leave_many_out_probabilities(predict, ids, response, MASK, 0.5, 3, generator)
    for masked, places in asked:  # only visible response tokens are masked, and all that are masked are asked for
        hidden = masked != ids
        assert torch.equal(hidden.nonzero(), torch.stack(places, 1)) and not (hidden & ~response).any()
    values, covered = expected(ids, asked)
    assert torch.allclose(found, values) and torch.equal(known, covered) and len(asked) == 3
    assert not known[:, 6].any() and not known[:, :3].any() and known.any() and not found[~known].any()


def test_a_seed_gives_the_same_draws_and_share_one_leaves_all_out():
    ids, response = torch.full((2, 6), 5), torch.ones(2, 6, dtype=torch.bool)
    draws = []
    for _ in range(2):
        predict, asked = recorder()
        leave_many_out_probabilities(predict, ids, response, MASK, 0.4, 2, torch.Generator().manual_seed(7))
        draws.append(torch.stack([masked for masked, _ in asked]))
    assert torch.equal(*draws)
    predict, asked = recorder()
    _, known = leave_many_out_probabilities(predict, ids, response, MASK, 1.0)
    assert known.all() and (asked[0][0] == MASK).all()
