"""Traces by OpenTelemetry, the extra `otel`: off unless one of its variables names an endpoint.

`spans`, and with it OpenTelemetry, is imported only if traces are on.
"""

from inference_api.core import Core
from inference_api.feature import Feature, Switch
from inference_api.settings import Settings, SettingsError, wants_traces


def build(core: Core, settings: Settings) -> Feature | None:
    """Traces, exported by OTLP as configured by OpenTelemetry's variables; off if none names an endpoint.

    Raises SettingsError if OpenTelemetry is not installed, or rejects one of its variables.
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
        raise SettingsError(f"OpenTelemetry rejects one of its variables (OTEL_...): {exc}") from None


FEATURE = Switch(build)
