"""An hour of series of routers, engines, hosts and GPUs, and the models that they are of."""

from collections.abc import Iterator
from typing import Any

from tests import prometheus as real

# A name that engines may have, and that would be an expression of its own if it could end its string
HOSTILE = 'x\\"} or vector(1) or up{a=~"({$[.*'
STEP, MINUTES = 15, 60
# Requests in a second of the model llama, and of another one
REQUESTS, FEW = 2.5, 0.1
# Minutes before noon in which nothing was scraped
GAP = range(20, 30)


def model(name: str, url: str = "http://gpu-1:8000", **more: Any) -> dict[str, Any]:
    return {"name": name, "backends": [{"url": url}], **more}


MODELS = (
    model("llama", "http://10.0.0.11:8000"),
    model("other", "http://10.0.0.12:8000"),
    model("hostile", served_model_name=HOSTILE),
)


def label(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"')


def counters(named: str, engine: str, requests: float) -> dict[str, float]:
    """What grows in a second, of one model, of whose requests one in five fails."""
    buckets = {f'inference_api_time_to_first_token_seconds_bucket{{{named},le="{le}"}}' for le in ("0.5", "1", "+Inf")}
    buckets |= {f'inference_api_time_per_output_token_seconds_bucket{{{named},le="{le}"}}' for le in ("0.05", "+Inf")}
    return {
        f'inference_api_requests_total{{{named},code="200"}}': 0.8 * requests,
        f'inference_api_requests_total{{{named},code="503"}}': 0.2 * requests,
        f'inference_api_stream_aborts_total{{{named},reason="upstream_reset"}}': 0.2 * requests,
        f'inference_api_tokens_total{{{named},type="input"}}': 300,
        f'inference_api_tokens_total{{{named},type="output"}}': 40,
        f"vllm:num_preemptions_total{{{engine}}}": 0.1,
        f"vllm:prefix_cache_hits_total{{{engine}}}": 30,
        f"vllm:prefix_cache_queries_total{{{engine}}}": 120,
        f"vllm:prompt_tokens_total{{{engine}}}": 300,
        f"vllm:generation_tokens_total{{{engine}}}": 40,
        f'vllm:request_success_total{{{engine},finished_reason="stop"}}': 2,
        **dict.fromkeys(buckets, 2),
    }


def samples(noon: int) -> tuple[dict[str, float], dict[str, float]]:
    """Series that grow, by how much in a second, and series that are."""
    router = 'instance="router-1:9090",job="router"'
    grow: dict[str, float] = {
        f"process_cpu_seconds_total{{{router}}}": 0.25,
        f'inference_api_event_loop_lag_seconds_bucket{{{router},le="0.01"}}': 10,
        f'inference_api_event_loop_lag_seconds_bucket{{{router},le="+Inf"}}': 10,
        f'inference_api_rejected_requests_total{{{router},model_name="unknown",reason="unknown_model"}}': 0.2,
    }
    still: dict[str, float] = {
        f"process_resident_memory_bytes{{{router}}}": 60e6,
        f'inference_api_build_info{{{router},version="1"}}': 1,
        f"inference_api_registry_last_success_timestamp_seconds{{{router}}}": noon / 1000 - 30,
    }
    for place, name in enumerate(("llama", "other", HOSTILE), 1):
        of_router = f'{router},model_name="{label("hostile" if name == HOSTILE else name)}"'
        of_engine = f'instance="10.0.0.1{place}:8000",engine="0",model_name="{label(name)}"'
        of_second = of_engine.replace('engine="0"', 'engine="1"')
        grow |= counters(of_router, of_engine, REQUESTS if name == "llama" else FEW)
        still |= {
            f"inference_api_requests_in_flight{{{of_router}}}": 3 * place,
            f"vllm:num_requests_running{{{of_engine}}}": 2 * place,
            f"vllm:num_requests_waiting{{{of_engine}}}": place,
            f"vllm:kv_cache_usage_perc{{{of_engine}}}": place / 10,
            f"vllm:kv_cache_usage_perc{{{of_second}}}": place / 20,
        }
    for host in ("10.0.0.11", "10.0.0.12"):
        of_host = f'instance="{host}:9100"'
        grow |= {
            f'node_cpu_seconds_total{{{of_host},cpu="0",mode="idle"}}': 0.25,
            f'node_cpu_seconds_total{{{of_host},cpu="0",mode="user"}}': 0.75,
            f'node_network_receive_bytes_total{{{of_host},device="eth0"}}': 1e6,
            f'node_network_receive_bytes_total{{{of_host},device="lo"}}': 9e6,
            f'node_network_transmit_bytes_total{{{of_host},device="eth0"}}': 2e6,
        }
        still |= {
            f"node_memory_MemAvailable_bytes{{{of_host}}}": 16e9,
            f"node_memory_MemTotal_bytes{{{of_host}}}": 64e9,
            f'node_filesystem_avail_bytes{{{of_host},mountpoint="/",fstype="ext4"}}': 10e9,
            f'node_filesystem_size_bytes{{{of_host},mountpoint="/",fstype="ext4"}}': 100e9,
            f'node_filesystem_size_bytes{{{of_host},mountpoint="/run",fstype="tmpfs"}}': 1e9,
            f'node_filesystem_avail_bytes{{{of_host},mountpoint="/run",fstype="tmpfs"}}': 1e9,
        }
    for line in real.DCGM.splitlines():
        if not line.startswith("#"):
            name, _, value = line.rpartition(" ")
            still[name.replace("{", '{instance="10.0.0.11:9400",', 1)] = float(value)
    return grow, still


def history(noon: int) -> Iterator[str]:
    """The hour before in the format of OpenMetrics, every 15 seconds."""
    grow, still = samples(noon)
    for at in range(0, MINUTES * 60 + 1, STEP):
        if GAP.start <= MINUTES - at / 60 < GAP.stop:
            continue
        moment = noon / 1000 - MINUTES * 60 + at
        # An exporter whose GPU has fallen off says NaN.
        nan = f'DCGM_FI_DEV_GPU_TEMP{{instance="10.0.0.12:9400",gpu="0",Hostname="gpu-2"}} NaN {moment:.0f}'
        yield from (f"{name} {value * at} {moment:.0f}" for name, value in grow.items())
        yield from (f"{name} {value} {moment:.0f}" for name, value in still.items())
        yield nan
    yield "# EOF\n"
