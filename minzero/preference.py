"""Preference tuning: what a pair of answers costs, by how much more likely each has become than by the reference.

The reference is the model that the tuning starts from. Of each answer only the log-probability by it is needed, which
is computed once (reference.py). Shapes in comments: P pairs, the preferred answer first.

DPO: Rafailov et al. 2023, arXiv 2305.18290, equation 7. IPO: Azar et al. 2023, arXiv 2310.12036, equation 17, with the
log-ratios per token, as its authors computed it and TRL does.
"""

import torch
from torch.nn import functional as F

METRICS = ("loss", "accuracy", "margin", "chosen", "rejected")  # of `Preference.means`


def dpo(ratios, tokens, beta):
    """-log sigmoid(beta (chosen - rejected)). ratios: log-ratios to the reference in nats, (P, 2); tokens: learned ones
    of each answer, (P, 2). Returns (P,)."""
    return -F.logsigmoid(beta * (ratios[:, 0] - ratios[:, 1]))


def ipo(ratios, tokens, beta):
    """(chosen - rejected - 1 / (2 beta))^2 of log-ratios per token. Arguments as of `dpo`."""
    means = ratios / tokens.clamp(min=1)
    return (means[:, 0] - means[:, 1] - 1 / (2 * beta)) ** 2


def dpo_norm(ratios, tokens, beta):
    """`dpo` of log-ratios per token, TRL's sigmoid_norm."""
    return dpo(ratios / tokens.clamp(min=1), tokens, beta)


LOSSES = {"dpo": dpo, "ipo": ipo, "dpo_norm": dpo_norm}


class Preference:
    """The loss of pairs of answers, and the rewards in the forward passes of training.

    kind: a name of LOSSES; beta: train.dpo_beta."""

    def __init__(self, kind, beta):
        self.kind = kind
        self.beta = beta
        self.sums = None  # over the pairs since the last `take`, of METRICS and 1

    def of_pairs(self, log_probabilities, reference, tokens):
        """Of each pair METRICS, float64 (P, 5). Arguments: of each answer the log-probability of its learned tokens in
        nats, that by the reference, and their number, each (2 P,), the answers of a pair one after the other."""
        ratios = (log_probabilities - reference).view(-1, 2)
        losses = LOSSES[self.kind](ratios, tokens.view(-1, 2), self.beta)
        rewards = self.beta * ratios.detach()
        margins = rewards[:, 0] - rewards[:, 1]
        return torch.stack((losses, (margins > 0).double(), margins, *rewards.unbind(dim=1)), dim=1)

    def __call__(self, log_probabilities, reference, tokens):
        """The mean loss of the pairs, a float32 scalar. Arguments as of `of_pairs`."""
        found = self.of_pairs(log_probabilities, reference, tokens)
        sums = torch.cat((found.detach().sum(dim=0), found.new_tensor([len(found)])))
        self.sums = sums if self.sums is None else self.sums + sums
        return found[:, 0].mean().float()

    def take(self):
        """The sums of METRICS over all pairs of the forward passes since the last call, and their number, float64 (6,);
        None without any."""
        sums, self.sums = self.sums, None
        return sums


def answers_of(reference, targets):
    """Where the answers of a batch are: the number of each token's answer, (B T,) int64, and what `reference` holds
    where an answer begins, (2 P,) float32. reference: as a PairStream has it, (B, T), preferably on the CPU, so that a
    GPU is not waited for."""
    reference = reference.flatten()
    begins = ~reference.isnan()
    numbers = (begins.cumsum(dim=0) - 1).clamp_(min=0)
    device = targets.device
    return numbers.to(device, non_blocking=True), reference[begins].to(device, non_blocking=True)
