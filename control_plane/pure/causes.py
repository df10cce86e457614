"""Which section of the runbook is about what an engine says, or how it ended. Nothing else chooses one."""

import re
from typing import NamedTuple

RUNBOOK = "k8s/runbook.md"


class Cause(NamedTuple):
    """`title`: of the section. `said`: what lines, events and exits say that are of this cause, in lower case."""

    title: str
    said: re.Pattern[str]

    @property
    def runbook(self) -> str:
        """File and anchor in the project's documents."""
        return f"{RUNBOOK}#{self.title.lower().replace(' ', '-')}"


def _cause(title: str, *said: str) -> Cause:
    return Cause(title, re.compile("|".join(said)))


# The first that fits holds: what is more exact stands before.
CAUSES: tuple[Cause, ...] = (
    _cause(
        "Engine with too small a cache",
        r"larger than the maximum number of tokens that can be stored in kv cache",
        r"no available memory for the cache blocks",
        r"kv cache is needed, which is larger than the available kv cache memory",
        r"is greater than the derived max_model_len",
        r"max_model_len\b.{0,200}\bis (?:greater|larger) than",
        r"max_batch_prefill_tokens.{0,200}\b(?:too|larger)\b",
    ),
    _cause(
        "Engine out of GPU memory",
        r"(?:cuda|hip|xpu)(?: error:)? out of memory",
        r"outofmemoryerror",
        r"cublas_status_alloc_failed",
        r"cuda_error_out_of_memory",
        r"less than desired gpu memory utilization",
        r"not enough memory to handle \S{1,40} prefill tokens",
    ),
    _cause(
        "Engine killed",
        r"\boomkilled\b",
        r"\boomkilling\b",
        r"\bexit (?:code )?137\b",
        r"\bsigkill\b",
        r"oom-kill",
        r"^killed$",
        r"defaultcpuallocator: can't allocate memory",
        r"\bmemoryerror\b",
        r"cannot allocate memory",
    ),
    _cause(
        "Engine without model files",
        r"gatedrepoerror",
        r"repositorynotfounderror",
        r"access to model \S{1,200} is restricted",
        r"cannot access gated repo",
        r"is not a local folder and is not a valid model identifier",
        r"localentrynotfounderror",
        r"does not appear to have a file named",
        r"cannot find any model weights",
        r"no such file or directory.{0,200}(?:safetensors|\.bin|\.gguf|config\.json)",
        r"(?:safetensors|\.bin|\.gguf|config\.json).{0,200}no such file or directory",
        r"safetensorerror",
        r"invalid repository id or local directory",
        r"no space left on device",
    ),
    _cause(
        "Engine port taken",
        r"address already in use",
        r"eaddrinuse",
        r"errno 98\b",
    ),
    _cause(
        "Engine workers that do not connect",
        r"\bnccl (?:error|warn|failure)",
        r"ncclinternalerror|ncclsystemerror|ncclunhandledcudaerror|ncclremoteerror|ncclinvalidusage",
        r"processgroupnccl.{0,200}(?:timeout|timed out)",
        r"distnetworkerror|distbackenderror|diststoreerror",
    ),
    _cause(
        "Engine that does not fit the GPU",
        r"no kernel image is available",
        r"cuda driver version is insufficient",
        r"nvidia driver on your system is too old",
        r"found no nvidia driver",
        r"no cuda gpus are available",
        r"failed to infer device type",
        r"forward compatibility was attempted on non supported hw",
        r"unsupported display driver / cuda driver combination",
        r"libcuda\.so|libcudart\.so",
        r"bfloat16 is only supported on gpus with compute capability",
        r"cuda error: (?:device-side assert|an illegal memory access|unspecified launch failure|invalid device)",
    ),
    _cause("Engine not scheduled", r"failedscheduling", r"insufficient (?:nvidia\.com/gpu|amd\.com/gpu|cpu|memory)"),
    _cause("Engine image not pulled", r"errimagepull|imagepullbackoff|invalidimagename|errimageneverpull"),
)


def cause_of(text: str) -> Cause | None:
    lower = text.lower()
    return next((one for one in CAUSES if one.said.search(lower)), None)
