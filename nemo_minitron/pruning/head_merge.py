"""Query heads that go leave something in one that stays: the residual of pruned heads ([P1] section 2.3).

A head that goes is merged into a head of its own KV group, whose keys and values both read. Of the L
heads of a group, sorted by importance and counted from one, K stay; head K + j goes into head K - j + 1,
and where more go than stay, the count starts over at head K. What is merged is linear in the weights:

``paper``
    W_Q,i <- W_Q,i + (W_Q,i - W_Q,2K-i+1) for i in [2K - L + 1, K], as it is printed, but for its lower
    bound, which there is 2K - L and would name a head L + 1. It needs K >= L / 2.
``sum_output``
    W_O,i <- W_O,i + the W_O of all that go into i: exact where their attention is the same.
``average_query``
    the same, and W_Q,i <- the mean of the W_Q of i and of all that go into i.

Which tensors these are, the family's table says: the rows that its heads stand in.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from nemo_minitron.families import Architecture, TensorRow
from nemo_minitron.families.grammar import Dim, row_axes, segments
from nemo_minitron.pruning.positions import dim_index
from nemo_minitron.pruning.select import Keep

HEADS, HIDDEN = "heads", "hidden"
QUERY, OUTPUT = "query", "output"
MERGED = {
    "paper": "query heads that go are taken from twice the query projection of one that stays",
    "sum_output": "the output projections of query heads that go are added to those of heads that stay",
    "average_query": "the output projections of query heads that go are added to those of heads that stay, "
    "and their query projections averaged",
}
"""What is done, in words."""
GONE = -1
"""In ``HeadMerge.into_LU``: a head whose whole KV group goes; nothing of it is left."""


@dataclass(frozen=True)
class HeadMerge:
    """What becomes of query heads that go.

    Attributes:
        how: ``paper``, ``sum_output`` or ``average_query``.
        into_LU: the head of the source that each of its heads goes into, shape [layers, heads], int64;
            a head that stays names itself, one that goes with its group ``GONE``.
    """

    how: str
    into_LU: Tensor


@dataclass(frozen=True)
class Mix:
    """A dimension whose surviving positions are sums of several of the source's.

    Attributes:
        dim: the dimension.
        indices_MP: positions in the source of each term of the sum, shape [terms, surviving]; those of
            the first are what survives without a sum.
        weights_MP: what each is multiplied by, float64; 0: the sum has fewer terms there.
    """

    dim: int
    indices_MP: Tensor
    weights_MP: Tensor


def check_head_merge(model: Architecture, targets: Mapping[str, int], how: str) -> None:
    """Refuses to merge heads where none go, or where the formula or the family has no place for it.

    Args:
        model: the source.
        targets: axis name to target size, for every axis.
        how: ``plan.head_merge``.

    Raises:
        ValueError: it is one of these.
    """
    if how == "none":
        return
    attention_rows(model, how)
    inside, kept = _inside(model, model.sizes), _inside(model, targets)
    if kept >= inside:
        raise ValueError(
            f"plan.head_merge={how}: expected fewer query heads in each KV group than the source's {inside}, "
            f"found {kept}: none goes that another could take in; lower plan.heads, or use none"
        )
    if how == "paper" and 2 * kept < inside:
        raise ValueError(
            f"plan.head_merge=paper: expected at least half of the {inside} query heads of each KV group, "
            f"found {kept}: the formula gives each head that stays one of those that go; use sum_output or "
            "average_query, or raise plan.heads"
        )


def check_head_merge_of_search(model: Architecture, how: str) -> None:
    """Refuses what not every size of a search, or of ``minitron sensitivity``, could have.

    Raises:
        ValueError: the printed formula, or a family whose heads cannot be merged.
    """
    if how == "none":
        return
    attention_rows(model, how)
    if how == "paper":
        raise ValueError(
            "plan.head_merge=paper: expected none, sum_output or average_query where many sizes are tried: "
            "the printed formula has no heads below half of a KV group"
        )


def merges(model: Architecture, targets: Mapping[str, int]) -> bool:
    """Whether heads go inside KV groups that stay, so that there is something to merge."""
    return _inside(model, targets) < _inside(model, model.sizes)


def _inside(model: Architecture, sizes: Mapping[str, int]) -> int:
    """Query heads of each KV group; 0 where the family groups none."""
    group = model.family.axes[HEADS].within if HEADS in model.family.axes else None
    return 0 if group is None else sizes[HEADS] // sizes[group]


def attention_rows(model: Architecture, how: str) -> dict[str, str]:
    """The rows of a model's table that its heads are merged in, recognised by the axes that they name.

    Heads can be merged where they lie in KV groups and are nothing but blocks of rows of a query
    projection (with its bias) and blocks of columns of an output projection.

    Returns:
        Pattern of a row to ``QUERY`` or ``OUTPUT``.

    Raises:
        ValueError: heads stand in another place, too: a norm or a sink of each, a gate beside the
            query, keys of their own.
    """
    family = model.family
    start = f"plan.head_merge={how}: family {family.model_type!r}"
    axis = family.axes[HEADS] if HEADS in family.axes else None
    if axis is None or axis.fixed or axis.within is None:
        raise ValueError(f"{start} has no query heads that share the keys of a KV group; use none")
    rows = [row for row in family.rows if _holds(row, axis.index) and model.has(row)]
    queries = {row.pattern for row in rows if _is_query(row)}
    outputs = {row.pattern for row in rows if _is_output(row)}
    found: dict[str, str] = {}
    for row in rows:
        if row.pattern in outputs:
            found[row.pattern] = OUTPUT
        elif row.pattern in queries or _is_bias(row, queries):
            found[row.pattern] = QUERY
        else:
            raise ValueError(
                f"{start} has heads in {row.pattern}, which is neither a query projection of whole heads nor "
                "the output projection behind them: what a head does there cannot be merged; use none"
            )
    if len(queries) != len(outputs):
        raise ValueError(
            f"{start} has {len(queries)} query and {len(outputs)} output projections, expected as many of "
            "both; use none"
        )
    return found


def _holds(row: TensorRow, placeholder: str | None) -> bool:
    return HEADS in row_axes(row.dims) or placeholder in row.placeholders


def _is_query(row: TensorRow) -> bool:
    """(heads head_dim) hidden, perhaps with keys and values behind the heads."""
    dims = row.dims
    return len(dims) == 2 and _whole(dims[0]) and dims[1] == ((HIDDEN,),)


def _is_bias(row: TensorRow, queries: set[str]) -> bool:
    weight = row.pattern.removesuffix(".bias") + ".weight"
    return weight in queries and len(row.dims) == 1 and _whole(row.dims[0])


def _is_output(row: TensorRow) -> bool:
    dims = row.dims
    return len(dims) == 2 and dims[0] == ((HIDDEN,),) and _whole(dims[1])


def _whole(dim: Dim) -> bool:
    """Whether the heads along a dimension are one run of blocks."""
    own = [product for product in dim if HEADS in product]
    return len(own) == 1 and len(own[0]) == 2 and own[0][0] == HEADS and not own[0][1].isdecimal()


def merged_into(scores_LU: Tensor, keep: Keep, group: str, groups: int) -> Tensor:
    """The head that each head goes into; see ``HeadMerge.into_LU``.

    Args:
        scores_LU: importance of the heads, shape [layers, heads].
        keep: kept units of the heads and, where they shrink, of their groups.
        group: the axis that the heads lie in.
        groups: its size.
    """
    layers, heads = scores_LU.shape
    kept_LK = keep[group] if group in keep else torch.arange(groups).expand(layers, -1)
    inside, stay = heads // groups, keep[HEADS].shape[-1] // kept_LK.shape[-1]
    order_LGU = torch.sort(
        scores_LU.unflatten(-1, (groups, inside)), dim=-1, descending=True, stable=True
    ).indices
    order_LGU = order_LGU + torch.arange(groups)[None, :, None] * inside
    rank_U = torch.arange(inside)
    partner_U = torch.where(rank_U < stay, rank_U, stay - 1 - (rank_U - stay) % stay)
    into_LU = torch.full((layers, heads), GONE)
    into_LU.scatter_(1, order_LGU.flatten(1), order_LGU[..., partner_U].flatten(1))
    stays_LG = torch.zeros(layers, groups, dtype=torch.bool).scatter_(1, kept_LK, True)
    return into_LU.where(stays_LG.repeat_interleave(inside, 1), torch.tensor(GONE))


def check_merge(merge: HeadMerge, heads_LK: Tensor, heads: int, group_size: int) -> None:
    """Refuses heads that go where no head of their group stays.

    Args:
        merge: what becomes of the heads.
        heads_LK: the heads that stay, shape [layers, kept].
        heads: heads of the source.
        group_size: of these in each KV group.

    Raises:
        ValueError: one does.
    """
    into_LU, every_U = merge.into_LU, torch.arange(heads)
    if into_LU.dtype != torch.int64 or into_LU.shape != (len(heads_LK), heads):
        raise ValueError(f"expected whole numbers of shape [{len(heads_LK)}, {heads}]")
    if into_LU.min() < GONE or into_LU.max() >= heads:
        raise ValueError(f"expected heads from 0 to {heads - 1}, or {GONE}")
    stays_LU = torch.zeros(into_LU.shape, dtype=torch.bool).scatter_(1, heads_LK, True)
    gone_LU = into_LU == GONE
    into_stays = stays_LU.gather(1, into_LU.clamp(min=0))
    same_group = into_LU // group_size == every_U // group_size
    if not (
        torch.equal(into_LU == every_U, stays_LU)
        and bool((gone_LU | (into_stays & same_group)).all())
    ):
        raise ValueError("expected for each head itself, or one of its group that stays")


def mix_of(
    row: TensorRow,
    role: str,
    how: str,
    into_U: Tensor,
    keep: Mapping[str, Tensor],
    sizes: Mapping[str, int],
) -> Mix | None:
    """How one tensor is summed; None: it is cut as without a merge.

    Args:
        row: its row in the table.
        role: the row's, of ``attention_rows``.
        how: ``HeadMerge.how``.
        into_U: the heads of its layer, as in ``HeadMerge.into_LU``.
        keep: kept units of its axes, shape [kept] each.
        sizes: size of every axis in the source model.
    """
    heads_MK, weights_MK = _terms(role, how, into_U, keep[HEADS])
    if len(heads_MK) == 1:
        return None
    dim = next(i for i, one in enumerate(row.dims) if any(HEADS in product for product in one))
    indices = [dim_index(row.dims[dim], sizes, {**keep, HEADS: heads_K}) for heads_K in heads_MK]
    weights = []
    for product, _, width in segments(row.dims[dim], sizes):
        if HEADS in product:
            weights.append(weights_MK.repeat_interleave(width // sizes[HEADS], dim=1))
            continue
        stay = dim_index((product,), sizes, keep)
        alone = torch.zeros(len(heads_MK), width if stay is None else len(stay)).double()
        alone[0] = 1.0
        weights.append(alone)
    return Mix(dim, torch.stack([i for i in indices if i is not None]), torch.cat(weights, dim=1))


def _terms(role: str, how: str, into_U: Tensor, kept_K: Tensor) -> tuple[Tensor, Tensor]:
    """Heads and weights of the sums, shape [terms, kept heads] each; a single term where nothing is added."""
    if (role == OUTPUT and how == "paper") or (role == QUERY and how == "sum_output"):
        return kept_K[None], torch.ones(1, len(kept_K), dtype=torch.float64)
    members = [(into_U == head).nonzero().flatten() for head in kept_K]
    terms = max(len(own) for own in members)
    heads_MK = kept_K.repeat(terms, 1)
    weights_MK = torch.zeros(terms, len(kept_K), dtype=torch.float64)
    for place, (head, own) in enumerate(zip(kept_K, members, strict=True)):
        others = own[own != head]
        heads_MK[1 : len(own), place] = others
        if how == "paper":  # head + (head - other), for each that has another
            weights_MK[0, place] = 1.0 + len(others)
            weights_MK[1 : len(own), place] = -1.0
        else:
            weights_MK[: len(own), place] = 1.0 / len(own) if role == QUERY else 1.0
    return heads_MK, weights_MK


def mixed(tensor: Tensor, mix: Mix) -> Tensor:
    """The sums of a tensor along one dimension, computed in float32 at least.

    The first term is what survives by itself, and stays what it is, to the bit, where its sum has no other.
    """
    wide = torch.float64 if tensor.dtype == torch.float64 else torch.float32
    shape = [-1 if place == mix.dim else 1 for place in range(tensor.dim())]
    total: Tensor | None = None
    for index_P, weight_P in zip(mix.indices_MP, mix.weights_MP, strict=True):
        term = tensor.index_select(mix.dim, index_P.to(tensor.device)).to(wide)
        weight = weight_P.to(tensor.device, wide).reshape(shape)
        term = term * weight
        total = term if total is None else torch.where(weight != 0, total + term, total)
    assert total is not None, "a sum has at least one term"
    return total.to(tensor.dtype)
