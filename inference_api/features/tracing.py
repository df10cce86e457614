"""Traces by OpenTelemetry, the extra `otel`: off unless one of its variables names an endpoint.

The spans are in `spans`, which is loaded, with OpenTelemetry, only where traces are asked for.
"""

from inference_api.core import Core
from inference_api.feature import Feature, Switch
from inference_api.settings import Settings, SettingsError, wants_traces


def build(core: Core, settings: Settings) -> Feature | None:
    """Spans that are sent by OTLP as OpenTelemetry's variables say; off where none of them names an endpoint.

    Raises SettingsError if OpenTelemetry is not installed, or refuses one of its variables.
    """
    if not wants_traces(core.outside.variables):
        return None
    try:
        from inference_api.features.spans import otlp_provider, tracing

        return tracing(otlp_provider())
    except ModuleNotFoundError as exc:
        raise SettingsError(
            f"OTEL_EXPORTER_OTLP_ENDPOINT asks for traces, but OpenTelemetry is not installed ({exc}); "
            "pip install 'inference-api[otel]', or unset it"
        ) from None
    except ValueError as exc:
        raise SettingsError(f"OpenTelemetry does not take one of its variables (OTEL_...): {exc}") from None


FEATURE = Switch(build)
