"""Keys of ``export``."""

from dataclasses import dataclass

from nemo_minitron.config.option import option


@dataclass
class ExportConfig:
    """The Hugging Face folder that goes out."""

    dtype: str | None = option(
        None, "dtype of the weights; null: the source's", ("float32", "bfloat16", "float16")
    )
    license: str | None = option(
        None, "licence id on the model card; null: the source's, where it names one"
    )
    name: str | None = option(
        None, "title of the model card; null: made from the source and its new size"
    )
    shard_size: int = option(5_000_000_000, "largest shard in bytes", least=1)
    push_to_hub: str | None = option(
        None, "hub repository to upload to (private unless export.public)"
    )
    public: bool = option(False, "make the hub repository public")
    revision: str | None = option(
        None, "branch of the hub repository to upload to; made where there is none"
    )
    tag: str | None = option(None, "tag that the upload gets")
    force: bool = option(False, "export although the quality gate failed; the model card says so")
    text_only: bool = option(
        False,
        "of a multimodal source, export the text model alone as a causal LM, without the parts around it",
    )
    nemo: bool = option(
        False, "also write the model as a .nemo archive, beside the export's folder"
    )
    gguf: list[str] = option(
        [],
        "GGUF files that are written beside the Hugging Face folder's files, by the type of their weights "
        "(f32, f16, bf16, q8_0)",
    )
    gguf_pre: str | None = option(
        None,
        "llama.cpp's name of the tokenizer's pre-tokenizer; null: known by what the tokenizer does",
    )
