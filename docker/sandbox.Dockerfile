# The images of the sandbox. Build them in the folder above this one:
#
#   docker build -f docker/sandbox.Dockerfile --target sandbox -t tir-alp-sandbox .
#   docker build -f docker/sandbox.Dockerfile --target service -t tir-alp-sandbox-service .
#
# sandbox: the image that backend "docker" starts. It contains Python, packages for programs, and the
#          few modules that become the fork server. The host decides what runs in it, and its limits.
# service: `python -m tir_alp.sandbox serve` with backend "landlock", for compose.yaml.
#
# BASE_IMAGE: any image with Python 3.11 or newer and pip. PACKAGES: what programs may import.
# Wheels in docker/wheels are used instead of an index; with those, no network is needed.
ARG BASE_IMAGE=python:3.12-slim-bookworm

FROM ${BASE_IMAGE} AS packages
ARG PACKAGES="numpy sympy"
# The first source only makes the second one optional.
COPY docker/sandbox.Dockerfile docker/wheel[s] /wheels/
RUN set -- --target /packages --no-cache-dir ${PACKAGES}; \
    if ls /wheels/*.whl >/dev/null 2>&1; then set -- --no-index --find-links /wheels "$@"; fi; \
    python3 -m pip install "$@"

FROM ${BASE_IMAGE} AS sandbox
COPY --from=packages /packages /sandbox/packages
COPY tools/sandbox/jail /sandbox/jail
# The path by which the host calls this image's Python, wherever that is.
RUN ldconfig; ln -s "$(command -v python3)" /sandbox/python; mkdir /sandbox/door
USER 65534:65534

FROM packages AS service-packages
ARG SERVICE_PACKAGES="pydantic>=2.11,<3 pyseccomp>=0.1.2,<0.2 rich>=14,<16 aiohttp>=3.11,<4 prometheus-client>=0.21,<1"
RUN set -- --target /service --no-cache-dir ${SERVICE_PACKAGES}; \
    if ls /wheels/*.whl >/dev/null 2>&1; then set -- --no-index --find-links /wheels "$@"; fi; \
    python3 -m pip install "$@"

FROM ${BASE_IMAGE} AS service
# The system call filter is compiled by libseccomp.
RUN ldconfig; python3 -c "import ctypes; ctypes.CDLL('libseccomp.so.2')" || \
    (apt-get update && apt-get install -y --no-install-recommends libseccomp2 && rm -rf /var/lib/apt/lists/*)
COPY --from=packages /packages /app/site-packages
COPY --from=service-packages /service /app/site-packages
COPY tir_alp/__init__.py tir_alp/process.py tir_alp/sandbox.py /app/tir_alp/
COPY tools /app/tir_alp/tools
ENV PYTHONPATH=/app:/app/site-packages PYTHONDONTWRITEBYTECODE=1
USER 65534:65534
EXPOSE 8080
ENTRYPOINT ["python3", "-m", "tir_alp.sandbox", "serve", "--host", "0.0.0.0", "--backend", "landlock"]
