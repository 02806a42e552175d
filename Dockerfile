# syntax=docker/dockerfile:1
#
#   docker build -t ajepa .
#   docker run --rm --gpus all --ipc=host --user "$(id -u):$(id -g)" -v "$PWD:/work" \
#       ajepa train --data recordings --out runs/mine
#
# `--target dist --output type=local,dest=dist` writes the source archives and wheels of both distributions instead.
# CUDA is the version of the toolkit that compiles the kernels. The driver of the host must support it.
#
# hadolint global ignore=DL3008
# (Ubuntu's package versions are not pinned: an image built later gets its security fixes.)
ARG CUDA=13.0.2

# --- Compilers and Python, also for the dev container. The older Ubuntu makes wheels that more systems can load.
FROM nvidia/cuda:${CUDA}-devel-ubuntu22.04 AS toolchain
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ git make python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 1000 --shell /bin/bash dev

# --- Archives and wheels. torch's headers suffice, so a CPU build of torch serves, from TORCH_BUILD_INDEX if it is given.
FROM toolchain AS build
ARG CUDA_ARCHS="80;90;100"
ARG TORCH="torch>=2.11"
ARG TORCH_BUILD_INDEX=""
ENV AJEPA_EXTENSION=1 AJEPA_CUDA=1 AJEPA_CUDA_ARCHS=${CUDA_ARCHS}
RUN --mount=type=cache,target=/root/.cache/pip \
    python3 -m venv /build \
    && PIP_EXTRA_INDEX_URL="${TORCH_BUILD_INDEX}" /build/bin/pip install "build>=1.2" "setuptools>=77" wheel "${TORCH}"
WORKDIR /source
COPY . .
RUN /build/bin/python -m build --no-isolation --outdir /dist . \
    && /build/bin/python -m build --no-isolation --outdir /dist kernels

FROM scratch AS dist
COPY --from=build /dist /

# --- The image to run: no nvcc and no sources. Triton and torch.compile call a C++ compiler at run time.
FROM nvidia/cuda:${CUDA}-base-ubuntu24.04 AS runtime
ARG EXTRAS="parquet"
ARG TORCH="torch>=2.11"
ARG TORCH_INDEX=""
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 10001 ajepa \
    && install -d -m 1777 /cache /work
RUN --mount=type=bind,from=dist,target=/dist --mount=type=cache,target=/root/.cache/pip \
    python3 -m venv /opt/ajepa \
    && PIP_EXTRA_INDEX_URL="${TORCH_INDEX}" /opt/ajepa/bin/pip install "$(echo /dist/ajepa-*.whl)[${EXTRAS}]" "${TORCH}"
# These folders are writable for any user, so `docker run --user` works.
ENV PATH=/opt/ajepa/bin:$PATH \
    AJEPA_CACHE=/cache/ajepa \
    MPLCONFIGDIR=/cache/matplotlib \
    TORCHINDUCTOR_CACHE_DIR=/cache/inductor \
    TRITON_CACHE_DIR=/cache/triton
USER 10001
WORKDIR /work
ENTRYPOINT ["ajepa"]
CMD ["--help"]
