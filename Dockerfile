# syntax=docker/dockerfile:1
# A release names it with its digest: --build-arg PYTHON_IMAGE=python:3.11-slim@sha256:...
ARG PYTHON_IMAGE=python:3.11-slim

FROM ${PYTHON_IMAGE} AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_NO_COMPILE=1
WORKDIR /src
RUN python -m venv /opt/venv && python -m venv /opt/build
COPY requirements.lock requirements-build.lock ./
# Wheels only: nothing is compiled here either, and a package that would need it fails the build.
RUN /opt/venv/bin/pip install --require-hashes --only-binary :all: -r requirements.lock \
    && /opt/build/bin/pip install --require-hashes --only-binary :all: -r requirements-build.lock
COPY pyproject.toml README.md LICENSE ./
COPY inference_api ./inference_api
COPY registry_stub ./registry_stub
COPY control_plane ./control_plane
COPY inference_control ./inference_control
COPY k8s/runbook.md ./k8s/
COPY docs/troubleshooting.md docs/operations.md docs/http.md docs/prompts.md docs/realtime.md ./docs/
# Nobody can write .pyc files later. They are not compared with their sources, whose times differ from build to build.
RUN /opt/build/bin/pip wheel --no-deps --no-build-isolation --wheel-dir /dist . \
    && /opt/venv/bin/pip install --no-deps /dist/*.whl \
    && /opt/venv/bin/python -m pip uninstall --yes pip setuptools \
    && python -m compileall -q -f --invalidation-mode unchecked-hash /opt/venv

FROM ${PYTHON_IMAGE}
ENV PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 INFERENCE_API_HOST=0.0.0.0
COPY --from=build /opt/venv /opt/venv
USER 10001:10001
EXPOSE 8000 9090
STOPSIGNAL SIGTERM
ENTRYPOINT ["inference-api"]
CMD ["serve"]
# Last: they differ from build to build, and nothing above has to be made anew for that. Where the source is to be read, and who
# answers for the image, is known to who builds it.
ARG PYTHON_IMAGE
ARG SOURCE=unknown
ARG VENDOR=unknown
ARG VERSION=0.1.0
ARG REVISION=""
ARG CREATED=1970-01-01T00:00:00Z
# `revision` of inference_api_build_info
ENV IMAGE_REVISION="${REVISION}"
LABEL org.opencontainers.image.title="inference-api" \
      org.opencontainers.image.description="A thin OpenAI-compatible inference router in front of vLLM and TGI pods" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.created="${CREATED}" \
      org.opencontainers.image.source="${SOURCE}" \
      org.opencontainers.image.url="${SOURCE}" \
      org.opencontainers.image.documentation="${SOURCE}" \
      org.opencontainers.image.vendor="${VENDOR}" \
      org.opencontainers.image.authors="${VENDOR}" \
      org.opencontainers.image.base.name="${PYTHON_IMAGE}"
