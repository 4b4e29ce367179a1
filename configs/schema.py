"""The configuration of a run: every key, its meaning, its bounds.

A configuration is frozen once read, an unknown key is refused with the nearest known one, and a value that does not fit
names its key and what was expected. `configs.load` reads it from YAML; this module knows nothing of files.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_bytes(value: Any) -> Any:
    """`"1.5GiB"` -> 1610612736; numbers pass through. Raises ValueError with the units that are known."""
    if not isinstance(value, str):
        return value
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*", value)
    if match is None or match[2].upper() not in UNITS:
        raise ValueError(f"expected a number of bytes such as 512MiB or 40GiB, got {value!r}")
    return int(float(match[1]) * UNITS[match[2].upper()])


Bytes = Annotated[int, BeforeValidator(parse_bytes), Field(gt=0)]
Positive = Annotated[int, Field(gt=0)]
MOST_DRAFTS = 32  # of a sequence in a round
MOST_WINDOW = 64  # of tokens to certify, likewise
INNER_DRAFTS = 5  # the same inside a certified window, where nobody chooses


class Section(BaseModel):
    """A part of the configuration: frozen, with no room for keys it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class ModelConfig(Section):
    """The target (verifier): whose output the user asked for."""

    target: str = Field(description="directory of a Hugging Face model (config.json, safetensors, tokenizer)")
    quantization: Literal["int4", "none"] = Field("int4", description="how the linear weights are held")
    group_size: Literal[32, 64, 128] = Field(128, description="weights that share one scale, along the input dimension")
    symmetric: bool = Field(True, description="false gives every group a zero point of its own")
    activations: Literal["auto", "16bit", "int8"] = Field(
        "auto",
        description="what int4 weights are multiplied with; int8 is rounded on the fly, a scale per row and group; "
        "auto is int8 on a CPU and 16bit on a GPU",
    )
    lm_head: Literal["auto", "16bit", "int8", "screened"] = Field(
        "auto",
        description="how the output head is held; int8 has a scale per token of the vocabulary, rounds what it is "
        "multiplied with too, and halves what a round reads of it; screened takes int4 weights for every logit and the 16-bit "
        "ones for those that may be the largest, so that the best token is 16bit's for a quarter of the reads; auto is "
        "screened on a CPU where linear weights are int4, else 16bit",
    )
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field(
        "auto", description="of activations, cache and unquantised weights; auto takes the checkpoint's"
    )

    @property
    def arithmetic(self) -> dict[str, Any]:
        """What of this decides a result: neither where the model lies nor, without int4, how int4 would be held."""
        head = "16bit" if self.lm_head == "auto" and self.quantization == "none" else self.lm_head
        int4 = self.quantization == "int4" or head == "screened"
        unused = set() if int4 else {"group_size", "symmetric", "activations"}
        return self.model_dump(exclude={"target", *unused}) | {"lm_head": head}


class SpeculationConfig(Section):
    """Who proposes tokens, and how many."""

    method: Literal["auto", "ngram", "suffix", "model", "none"] = Field(
        "ngram",
        description="drafts come from the sequence itself, from all text of the job, from a small model, or not at all; auto "
        "takes for every sequence what stood most, of the first two and of the third if there is a model",
    )
    model: str | None = Field(None, description="directory of the draft model, for method: model or auto")
    num_speculative_tokens: Literal["auto"] | Annotated[int, Field(ge=0, le=MOST_DRAFTS)] = Field(
        "auto",
        description="k: drafts per sequence and round; auto chooses for every sequence what gives most tokens per second, from "
        "what rounds take and from what stood, and none where drafts don't pay",
    )
    prompt_lookup_min: Positive = Field(1, description="shortest match that ngram and suffix draft from, in tokens")
    prompt_lookup_max: Positive = Field(4, description="longest match looked for, in tokens")

    @model_validator(mode="after")
    def check(self) -> SpeculationConfig:
        if self.method == "model" and self.model is None:
            raise ValueError("method: model needs speculation.model, the directory of a draft model")
        if self.prompt_lookup_min > self.prompt_lookup_max:
            raise ValueError("prompt_lookup_min is larger than prompt_lookup_max")
        return self

    @property
    def width(self) -> int:
        """The most tokens one round drafts for one sequence."""
        if self.method == "none":
            return 0
        return MOST_DRAFTS if self.num_speculative_tokens == "auto" else self.num_speculative_tokens


class VerificationConfig(Section):
    """Whether the 16-bit model has the last word on what the int4 model writes."""

    certify: Literal["none", "full"] = Field(
        "none", description="full: the 16-bit model checks what the int4 model writes, and the output is what it would have "
        "given alone"
    )
    reference: str | None = Field(
        None, description="directory of the 16-bit model, where model.target is a checkpoint of int4 weights made of it; "
        "by default model.target"
    )
    certify_window: Literal["auto"] | Annotated[int, Field(ge=1, le=MOST_WINDOW)] = Field(
        "auto",
        description="tokens the int4 model writes in a sequence before the 16-bit model checks them in one pass; auto chooses "
        "for every sequence what gives most tokens per second, from what both models take and from what stood",
    )
    certify_weights: Literal["device", "host"] = Field(
        "device", description="where the 16-bit model's layers are kept; from the host they come to the device one after the "
        "other in every pass, and take there what two layers take"
    )


class ParallelConfig(Section):
    """How ranks share the work: N ranks make N / tensor groups, each with a whole copy of the target."""

    tensor: Positive | None = Field(None, description="ranks of a group; by default all ranks make one group")
    all_reduce: Literal["auto", "nccl", "symmetric"] = Field(
        "auto", description="how GPUs of a node exchange small sums: through NCCL, or reading each other's memory, which auto "
        "takes where they can"
    )


class EngineConfig(Section):
    """What one group may use, and how wide a round may be."""

    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto takes a GPU where there is one")
    max_num_seqs: Positive = Field(16, description="sequences that run at once in a group")
    max_num_batched_tokens: Positive = Field(512, description="tokens one round computes at most, over all sequences")
    max_model_len: Positive | None = Field(None, description="prompt and output together; by default the model's own limit")
    kv_cache_memory: Bytes | None = Field(
        None, description="bytes of a rank's KV cache (target and draft); by default what max_num_seqs full sequences need, "
        "within half of the free memory"
    )
    kv_cache_dtype: Literal["auto", "fp8", "int8"] = Field(
        "auto", description="how keys and values are held: auto in the model's dtype; fp8 and int8 in eight bits with a scale "
        "for each token and head, which halves a 16-bit cache and changes the output"
    )
    block_size: Literal[8, 16, 32, 64, 128] = Field(16, description="tokens of a KV cache block")
    reproducible: bool = Field(
        True, description="the same bits whatever else runs; false lets libraries add as they like where that is faster: "
        "16-bit products of many rows, sums between hosts and GPUs"
    )
    threads: Positive | None = Field(None, description="CPU threads of a rank; by default the cores shared evenly")


class CoordinationConfig(Section):
    """How decisions are merged, and how long anyone waits for anyone."""

    merge: Literal["group", "coordinator"] = Field("group", description="where a group's verdicts become a decision")
    lease: Positive | None = Field(
        None, description="rounds a plan lasts under merge: group; by default 4, or 1 with verification.certify, whose rounds "
        "are long"
    )
    endpoint: str | None = Field(
        None, description="ZeroMQ address of the coordinator, tcp://HOST:PORT; by default a free local one"
    )
    curve: str | None = Field(
        None, description="directory of CURVE keys (`python -m workers.keys DIR`); needed by any endpoint that is not local"
    )
    heartbeat: Annotated[float, Field(gt=0)] = Field(1.0, description="seconds between signs of life")
    timeout: Annotated[float, Field(gt=0)] = Field(20.0, description="seconds of silence after which a peer counts as dead")
    startup_timeout: Annotated[float, Field(gt=0)] = Field(600.0, description="seconds until every rank has loaded its model")

    @model_validator(mode="after")
    def check(self) -> CoordinationConfig:
        if self.timeout <= 2 * self.heartbeat:
            raise ValueError("timeout must be more than two heartbeats, or a late one looks like a death")
        return self


class SamplingConfig(Section):
    """What holds for requests that leave parameters out."""

    defaults: Literal["model", "openai"] = Field(
        "model", description="where parameters that a request leaves out come from: the model's generation_config.json, "
        "then OpenAI's values, or these alone"
    )


class FilesConfig(Section):
    """Where requests come from and results go; the command line's --input, --output and --summary win."""

    input: str | None = Field(None, description="requests, a batch file of JSON lines")
    output: str | None = Field(None, description="results, and the journal to resume from")
    summary: str | None = Field(None, description="the numbers of the run, as JSON")


class RunConfig(Section):
    """A whole run."""

    model: ModelConfig
    speculation: SpeculationConfig = SpeculationConfig()
    verification: VerificationConfig = VerificationConfig()
    parallel: ParallelConfig = ParallelConfig()
    engine: EngineConfig = EngineConfig()
    coordination: CoordinationConfig = CoordinationConfig()
    sampling: SamplingConfig = SamplingConfig()
    files: FilesConfig = FilesConfig()
    seed: int = Field(0, description="of requests that bring none; mixed with their custom_id")

    @model_validator(mode="after")
    def check(self) -> RunConfig:
        if self.certified and self.model.quantization == "none":
            raise ValueError("verification.certify: full has nothing to check with model.quantization: none; leave one out")
        if self.verification.reference is not None and not self.certified:
            raise ValueError("verification.reference is the model that certifies; it needs verification.certify: full")
        inner, outer = self.inner_width if self.certified else 0, 0 if self.varied else self.width
        key = "certify_window" if self.certified else "num_speculative_tokens"
        wide, name = max((inner, "num_speculative_tokens"), (outer, key))
        if self.engine.max_num_batched_tokens <= wide:
            raise ValueError(
                f"engine.max_num_batched_tokens must be at least {name} + 1 = {wide + 1}, or no sequence could ever be checked"
            )
        return self

    @property
    def chosen(self) -> bool:
        """Whether the coordinator chooses, among numbers of drafts, drafters, or windows."""
        if self.certified:
            return self.verification.certify_window == "auto"
        speculation = self.speculation
        among = speculation.num_speculative_tokens == "auto" or (speculation.method == "auto" and speculation.model is not None)
        return among and speculation.width > 0

    @property
    def varied(self) -> bool:
        """Whether there is more than one number to choose among."""
        return (self.verification.certify_window if self.certified else self.speculation.num_speculative_tokens) == "auto"

    @property
    def certified(self) -> bool:
        return self.verification.certify == "full"

    @property
    def verifier(self) -> ModelConfig:
        """The model whose output it is: the target, or the 16-bit model that certifies it."""
        if not self.certified:
            return self.model
        directory = self.verification.reference or self.model.target
        return self.model.model_copy(update={"target": directory, "quantization": "none", "lm_head": "16bit"})

    @property
    def width(self) -> int:
        """The most tokens that one of the verifier's rounds is given to check of one sequence."""
        window = self.verification.certify_window
        return self.speculation.width if not self.certified else MOST_WINDOW if window == "auto" else window

    @property
    def inner_width(self) -> int:
        """The most tokens that are drafted for one of the int4 model's rounds, where another model certifies."""
        return INNER_DRAFTS if self.speculation.num_speculative_tokens == "auto" else self.speculation.width
