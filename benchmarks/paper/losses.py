"""What a student learns from: divergences and mixes, temperature, the teacher's largest entries, hidden states.

Protocol: the width cut (and, for hidden states, the depth cut) is trained on the same samples with each loss. Top-k keeps
one bucket for the rest (``topk_kl``); without that bucket the loss is 0 where the student moves mass to the tail, so that
we do not offer it: benchmarks/paper/checks/topk_tail.py trains with and without it in plain torch.
Claims: [P1] section 3, best practices 5 to 7, tables 15 to 18, appendix A.3. Equal means: within 0.02 nats.
"""

from collections.abc import Iterator
from typing import Any

from benchmarks.paper.lab import Lab, Model, to
from benchmarks.paper.verdict import Claim

TITLE = "Losses of the distillation"
_STATES = "distill.intermediate.terms=[hidden,embedding]"
_WAYS: dict[str, tuple[str, ...]] = {
    "forward KL": (),
    "reverse KL": ("distill.divergence=reverse_kl",),
    "Jensen-Shannon": ("distill.divergence=jsd",),
    "mean squared error": ("distill.divergence=mse",),
    "cosine": ("distill.divergence=cosine",),
    "cross-entropy alone": ("distill.kl=0", "distill.ce=1"),
    "forward KL + cross-entropy": ("distill.ce=1",),
    "temperature 0.5": ("distill.temperature=0.5",),
    "temperature 3": ("distill.temperature=3",),
    "top 10 and the rest": ("distill.divergence=topk_kl", "distill.top_k=10"),
    "top 100 and the rest": ("distill.divergence=topk_kl", "distill.top_k=100"),
    "forward KL + hidden states": (_STATES,),
}
_OF_THE_DEPTH_CUT: dict[str, tuple[str, ...]] = {
    "forward KL": (),
    "forward KL + hidden states": (_STATES,),
    "forward KL + hidden states of the last layer": (
        _STATES,
        "distill.intermediate.layers=[-1:-1]",
    ),
}
CLAIMS = (
    Claim("Distillation beats cross-entropy", "[P1] best practice 5, table 11", "forward KL", ("cross-entropy alone",)),
    Claim("Forward KL beats reverse KL", "[P1] tables 15 and 16", "forward KL", ("reverse KL",)),
    Claim("Forward KL beats mean squared error and cosine", "[P1] tables 15 and 16", "forward KL",
          ("mean squared error", "cosine")),
    Claim("Adding cross-entropy does not help (KL alone is better, or ± 0.02 equal)", "[P1] best practice 7, tables 17 and 18",
          "forward KL", ("forward KL + cross-entropy",), margin=0.02, one_sided=True),
    Claim("Temperature 1 beats 0.5 and 3", "[P1] A.3: best of {0.1, 0.5, 1, 3}", "forward KL",
          ("temperature 0.5", "temperature 3")),
    Claim("Few entries of the teacher hurt", "[P1] A.3: k up to 100 clearly hurts", "forward KL",
          ("top 10 and the rest",)),
    Claim("Hidden states do not help after a cut in width (± 0.02)", "[P1] best practices 6 and 7, tables 17 and 18", "forward KL",
          ("forward KL + hidden states",), margin=0.02, one_sided=True),
    Claim("They help where much depth was removed", "[P1] best practice 6", "depth, forward KL + hidden states",
          ("depth, forward KL",)),
    Claim("They help there, those of the last layer", "[P1] best practice 6, of layers near the end",
          "depth, forward KL + hidden states of the last layer", ("depth, forward KL",)),
)  # fmt: skip
NOTE = """In plain torch (`benchmarks/paper/checks/what_teaches.py`, first teacher, cut and trained without our package), after 60 steps of the width cut:
text 3.665; logits at temperature 0.5 3.689, 1 3.613, 2 3.608, 3 3.613, 5 3.627, 10 3.642; with text 3.616; with states 3.600. Temperature 1 is
no sharp optimum there either. Of the depth cut: logits 3.527; with the states of the third layer from the end (the default, and [P1]'s for 32
layers) 3.527, of the second 3.523, of the last 3.516. A student of three layers has no third from the end but its first,
which the default asks to do what four of the teacher's layers do. With the states of the last layer the claim holds, as the next row says."""


def measure(lab: Lab) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows of one seed."""
    width, depth = to(lab.profile.sizes["width"]), to(lab.profile.sizes["depth"])
    for name, teach in _WAYS.items():
        yield name, lab.before_and_after(Model(width, teach, lab.profile.short))
    for name, teach in _OF_THE_DEPTH_CUT.items():
        yield f"depth, {name}", lab.before_and_after(Model(depth, teach, lab.profile.short))
