"""nemo_minitron: smaller language models out of bigger ones, by the Minitron recipe.

A name that ends in capitals is a tensor, and each capital one of its axes, as in ``hidden_TH``:

B samples of a batch; N samples of a set, in ``losses`` the tokens of a block of a chunk;
S positions of a sample; P positions of a prompt; T tokens (samples x positions); C tokens of a chunk;
H hidden channels, where there are two models the student's; G the teacher's, in ``pruning`` groups;
V entries of the vocabulary; W those of them that a shard holds; K those that are known or kept;
L layers; E experts; U units of an axis: channels, heads, neurons; R heads of a relation, D channels of one;
O output and I input channels of a weight; 1 an axis kept after a sum.
"""

__version__ = "0.1.0"
