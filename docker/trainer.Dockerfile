# The image of a run's actors: `image` in [cluster], and the pods of configs/cluster/kuberay.yaml.
# Build it in the root of the repository:
#
#   docker build -f docker/trainer.Dockerfile -t tir-alp .
#
# BASE_IMAGE: any image of Debian's family with Python 3.11 or newer, its headers and pip. Ray needs
# the minor version of Python that the run is started with.
# EXTRAS: extras of pyproject.toml; "ray,data,lora" is enough if engines are embedded.
ARG BASE_IMAGE=python:3.12-slim-bookworm

FROM ${BASE_IMAGE}
# libseccomp compiles the system call filter, a C compiler the engines' kernels; Kubernetes probes by
# wget.
RUN apt-get update && apt-get install -y --no-install-recommends bash gcc libc6-dev libseccomp2 wget && \
    rm -rf /var/lib/apt/lists/*
ARG EXTRAS="ray,data,lora,sglang"
# Packages come first, so that a change of the code does not install them again.
COPY pyproject.toml constraints.txt README.md /opt/tir_alp/
RUN mkdir /opt/tir_alp/tir_alp && touch /opt/tir_alp/tir_alp/__init__.py && \
    python3 -m pip install --no-cache-dir -c /opt/tir_alp/constraints.txt "/opt/tir_alp[${EXTRAS}]" && \
    python3 -m pip uninstall -y tir_alp
COPY tir_alp /opt/tir_alp/tir_alp
COPY envs /opt/tir_alp/envs
COPY tools /opt/tir_alp/tools
COPY configs /opt/tir_alp/configs
ENV PYTHONPATH=/opt/tir_alp
# Ray looks for `python`.
RUN command -v python || ln -s "$(command -v python3)" /usr/local/bin/python
