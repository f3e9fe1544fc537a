"""Criteria of other techniques, restated from their papers; their scores go where ours would lie.

A criterion fills a workspace's ``scores`` with rankings, in the format and through the functions that 'minitron score'
uses; plan, prune and distill take them as they take ours. All read the calibration samples that our scoring reads.

* LLM-Pruner (arXiv 2305.11627), equation 6 with its first term: of each weight |w dL/dw|, summed over the weights that
  go together (a neuron's rows of gate and up and its column of down; a head's rows of Q and columns of O; a channel's
  of all matrices). L is the language-model loss on the calibration samples.
* FLAP (arXiv 2312.11983), equation 4: the variance of an input feature over the samples times the squared norm of its
  column, in down (neurons) and O (heads: the sum over their channels). Its bias compensation (a bias for down and O)
  would give the model tensors that its family does not have; it is left out, and the tables say so.
* optipfair's peak-to-peak magnitude (arXiv 2512.22671): max w + |min w| of a neuron's rows of gate and up.
* Model-Optimizer's mcore_minitron: sqrt of the sum over samples of (mean over positions of |x|)^2 at the inputs of down
  and O (a head: the norm over its channels), and at the outputs of the norms, summed over these.
* SliceGPT (arXiv 2401.15024): one rotation of the residual stream into its principal components, of which the last
  are cut. SliceGPT has a rotation for every block, and a matrix on every residual connection for the change between
  them: no tensor of the family. One for all blocks keeps the architecture: exact for RMSNorm until it is cut.
"""

import json
import math
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nemo_minitron.checkpoints.checkpoint import open_checkpoint
from nemo_minitron.config.config import Config
from nemo_minitron.data.calibration_samples import calibration_samples
from nemo_minitron.data.mixtures import calibration_mixture
from nemo_minitron.models.causal_lm import load_model, load_tokenizer
from nemo_minitron.pruning.select import score_shape
from nemo_minitron.scoring.scores_file import Scores, write_scores
from nemo_minitron.stages.inputs import teacher_folder
from nemo_minitron.workspace.build import make
from nemo_minitron.workspace.layout import Workspace

ROTATED = ("slicegpt",)
"""Criteria that rank the channels of a rotated model."""
_BATCH = 16
_READ = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
_WRITE = ("o_proj", "down_proj")


def write(name: str, config: Config) -> None:
    """Fills ``scores`` of a configuration's workspace by a criterion; the source must be there."""
    folder, item = teacher_folder(config)

    def build(temporary: Path) -> None:
        architecture = open_checkpoint(folder).architecture
        sizes = architecture.sizes
        found = CRITERIA[name](folder, samples_of(config, folder))
        shapes = {a: score_shape(architecture.family, sizes, a) for a in architecture.prunable}
        kept = {axis: value.cpu().reshape(shapes[axis]) for axis, value in found.items()}
        write_scores(temporary, Scores(kept))

    settings = {"importance": name, "samples": config.data.calibration.samples}
    make(Workspace(Path(config.workspace)).scores, "scores", settings, [item], build)


def samples_of(config: Config, folder: Path) -> Tensor:
    """The calibration samples of a configuration, by a folder's tokenizer."""
    own = config.data.calibration
    return calibration_samples(
        calibration_mixture(config),
        load_tokenizer(folder),
        own.sequence_length,
        own.samples,
        own.seed,
    ).tokens_NS


def _loaded(folder: Path) -> Any:
    model = load_model(folder, dtype=torch.float32)
    return model.to("cuda" if torch.cuda.is_available() else "cpu")


def _layers(model: Any) -> Any:
    return model.model.layers


def _projections(layer: Any) -> dict[str, Any]:
    every = {**dict(layer.mlp.named_children()), **dict(layer.self_attn.named_children())}
    return {name: module for name, module in every.items() if name in (*_READ, *_WRITE)}


def _with_inputs(
    model: Any, tokens_NS: Tensor, modules: Mapping[Any, Any], see: Callable[[Any, Tensor], None],
    output: bool = False,
) -> None:  # fmt: skip
    """Runs the model, and shows what goes into modules (or comes out): float64 of shape [samples, positions, units]."""
    handles = [
        module.register_forward_hook(
            lambda _m, args, out, key=key: see(key, (out if output else args[0]).double())
        )
        for key, module in modules.items()
    ]
    with torch.no_grad():
        for batch_BS in tokens_NS.split(_BATCH):
            model(batch_BS[:, :-1].to(model.device), use_cache=False)
    for handle in handles:
        handle.remove()


def _taylor(folder: Path, tokens_NS: Tensor) -> dict[str, Tensor]:
    """LLM-Pruner: |w dL/dw|, summed over a group."""
    model = _loaded(folder)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    batches = tokens_NS.split(_BATCH)
    for batch_BS in batches:
        batch_BS = batch_BS.to(model.device)
        (model(batch_BS, labels=batch_BS, use_cache=False).loss / len(batches)).backward()

    def salience(module: Any) -> Tensor:
        found: Tensor = (module.weight * module.weight.grad).detach().abs().double()
        return found

    ffn, heads, hidden = [], [], salience(model.model.embed_tokens).sum(0)
    width = model.config.head_dim
    for layer in _layers(model):
        by = {name: salience(module) for name, module in _projections(layer).items()}
        rows = [by[name].sum(1) for name in ("gate_proj", "up_proj") if name in by]
        ffn.append(sum(rows, by["down_proj"].sum(0)))
        of_channels = by["q_proj"].sum(1) + by["o_proj"].sum(0)
        heads.append(of_channels.view(-1, width).sum(1))
        hidden = hidden + sum(by[name].sum(0) for name in by if name in _READ)
        hidden = hidden + by["o_proj"].sum(1) + by["down_proj"].sum(1)
    if model.lm_head.weight is not model.model.embed_tokens.weight:
        hidden = hidden + salience(model.lm_head).sum(0)
    layers = [f.sum() + h.sum() for f, h in zip(ffn, heads, strict=True)]
    return {
        "ffn": torch.stack(ffn), "heads": torch.stack(heads), "hidden": hidden, "layers": torch.stack(layers),
    }  # fmt: skip


def _inputs(model: Any) -> dict[tuple[str, int], Any]:
    """The projections that write to the residual stream."""
    return {
        (axis, number): _projections(layer)[name]
        for number, layer in enumerate(_layers(model))
        for axis, name in (("ffn", "down_proj"), ("heads", "o_proj"))
    }


def _fluctuation(folder: Path, tokens_NS: Tensor) -> dict[str, Tensor]:
    """FLAP: variance of the input feature times the squared norm of its column."""
    model = _loaded(folder)
    modules = _inputs(model)
    sums: dict[Any, list[Tensor]] = {}

    def see(key: Any, x_BSU: Tensor) -> None:
        x_TU = x_BSU.flatten(0, 1)
        new = [torch.tensor(float(len(x_TU))), x_TU.sum(0), x_TU.square().sum(0)]
        sums[key] = [a + b for a, b in zip(sums[key], new, strict=True)] if key in sums else new

    _with_inputs(model, tokens_NS, modules, see)
    found: dict[str, list[Tensor]] = {"ffn": [], "heads": []}
    for key, module in modules.items():
        count, total, squares = sums[key]
        variance = (squares / count - (total / count).square()).clamp(min=0)
        metric = variance * module.weight.detach().double().square().sum(0)
        if key[0] == "heads":
            metric = metric.view(-1, model.config.head_dim).sum(1)
        found[key[0]].append(metric)
    return {axis: torch.stack(rows) for axis, rows in found.items()}


def _peak_to_peak(folder: Path, _tokens_NS: Tensor) -> dict[str, Tensor]:
    """optipfair: max w + |min w| of a neuron's rows of gate and up."""
    model, rows = _loaded(folder), []
    for layer in _layers(model):
        by = _projections(layer)
        weights = [
            by[name].weight.detach().double() for name in ("gate_proj", "up_proj") if name in by
        ]
        rows.append(sum(w.max(1).values + w.min(1).values.abs() for w in weights))
    return {"ffn": torch.stack(rows)}  # type: ignore[arg-type]


def _model_optimizer(folder: Path, tokens_NS: Tensor) -> dict[str, Tensor]:
    """Model-Optimizer's mcore_minitron: mean over positions, l2 over samples."""
    model = _loaded(folder)
    squares: dict[Any, Tensor] = {}

    def see(key: Any, x_BSU: Tensor) -> None:
        squares[key] = squares.get(key, torch.zeros(())) + x_BSU.abs().mean(1).square().sum(0)

    _with_inputs(model, tokens_NS, _inputs(model), see)
    norms = {
        (name, number): getattr(layer, name)
        for number, layer in enumerate(_layers(model))
        for name in ("input_layernorm", "post_attention_layernorm")
    }
    _with_inputs(model, tokens_NS, norms, see, output=True)
    count = len(_layers(model))
    ffn = torch.stack([squares["ffn", i].sqrt() for i in range(count)])
    heads = [squares["heads", i].sqrt().view(-1, model.config.head_dim) for i in range(count)]
    return {
        "ffn": ffn, "heads": torch.stack([head.norm(dim=1) for head in heads]),
        "hidden": torch.stack([squares[key].sqrt() for key in norms]).sum(0),
    }  # fmt: skip


def rotated(source: Path, target: Path, hidden: int, tokens: Callable[[], Tensor]) -> Path:
    """A Llama whose residual stream is rotated into its principal components, for a cut to ``hidden`` channels.

    The gains of the norms go into the matrices behind them. What an RMSNorm divides by is a mean over
    channels: the remaining gain makes it that of all channels, where the first ``hidden`` hold nearly
    all of the stream. Writes the variances into ``components.json``.
    """
    if (target / "components.json").is_file():
        return target
    model = _loaded(source)
    for layer in _layers(model):  # gains go into what reads behind the norm
        for norm, readers in (
            (layer.input_layernorm, ("q_proj", "k_proj", "v_proj")),
            (layer.post_attention_layernorm, ("gate_proj", "up_proj")),
        ):
            for name in readers:
                _projections(layer)[name].weight.data.mul_(norm.weight.data)
            norm.weight.data.fill_(1.0)
    model.lm_head.weight.data.mul_(model.model.norm.weight.data)
    model.model.norm.weight.data.fill_(1.0)
    width = model.config.hidden_size
    covariance = torch.zeros(width, width, dtype=torch.float64, device=model.device)

    def see(_key: Any, x_BSH: Tensor) -> None:
        covariance.add_(x_BSH.flatten(0, 1).T @ x_BSH.flatten(0, 1))

    norms = {
        (name, number): getattr(layer, name)
        for number, layer in enumerate(_layers(model))
        for name in ("input_layernorm", "post_attention_layernorm")
    }
    _with_inputs(model, tokens(), norms, see, output=True)
    values, vectors = torch.linalg.eigh(covariance)
    turn = vectors.flip(1)
    for weight in [model.model.embed_tokens.weight, model.lm_head.weight]:
        weight.data = (weight.data.double() @ turn).float()
    for layer in _layers(model):
        for name, module in _projections(layer).items():
            weight = module.weight.data.double()
            module.weight.data = (weight @ turn if name in _READ else turn.T @ weight).float()
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            norm.weight.data.fill_(math.sqrt(width / hidden))
    model.model.norm.weight.data.fill_(math.sqrt(width / hidden))
    target.mkdir(parents=True, exist_ok=True)
    for path in source.iterdir():
        if path.is_file() and "token" in path.name:
            shutil.copy(path, target)
    model.save_pretrained(target)
    (target / "components.json").write_text(json.dumps(values.flip(0).tolist()))
    return target


def _components(folder: Path, _tokens_NS: Tensor) -> dict[str, Tensor]:
    """SliceGPT: the variance of each principal component of the residual stream."""
    values = json.loads((folder / "components.json").read_text())
    return {"hidden": torch.tensor(values, dtype=torch.float64)}


CRITERIA: Mapping[str, Callable[[Path, Tensor], dict[str, Tensor]]] = {
    "llm-pruner": _taylor,
    "flap": _fluctuation,
    "optipfair": _peak_to_peak,
    "model-optimizer": _model_optimizer,
    "slicegpt": _components,
}
