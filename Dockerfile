# Co-DETR as an image; docs/get_started.md, "Container", says how it is built and run.
#
# The first stage has a compiler and makes the wheel, the second one installs it without. The build
# arguments below are for the CPU. For CUDA, BUILD_IMAGE is one with the CUDA toolkit of PyTorch's
# major version, and FORCE_CUDA=1; what the kernels need to run comes with PyTorch.
ARG BUILD_IMAGE=python:3.12-trixie
ARG RUN_IMAGE=python:3.12-slim-trixie

FROM ${BUILD_IMAGE} AS build
# Of PyTorch, as pytorch.org names them; empty: the default index.
ARG TORCH_INDEX=""
ARG FORCE_CUDA=0
# GPU architectures, such as "8.0;9.0"; empty: all that the toolkit knows.
ARG TORCH_CUDA_ARCH_LIST=""
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN command -v python3-config || \
    (apt-get update && apt-get install -y --no-install-recommends g++ python3-dev python3-venv)
RUN python3 -m venv /venv
ENV PATH=/venv/bin:$PATH
RUN pip install ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} torch torchvision
RUN pip install build "setuptools<81" wheel ninja
WORKDIR /src
COPY setup.py pyproject.toml MANIFEST.in constraints.txt requirements*.txt LICENSE ./
COPY configs configs
COPY co_detr co_detr
RUN python -m build --no-isolation

FROM ${RUN_IMAGE}
ARG TORCH_INDEX=""
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN pip install ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} torch torchvision
# Mounted, not copied: a copy would stay in the image.
RUN --mount=type=bind,from=build,source=/src/dist,target=/dist \
    pip install "$(ls /dist/*.whl)[demo,export,quickstart,video]" && \
    co-detr install-detectron2
# Whoever runs it with --user has no home but this one, which takes caches and fetched weights.
RUN useradd --create-home detr && chmod 1777 /home/detr
ENV HOME=/home/detr
USER detr
WORKDIR /work
ENTRYPOINT ["co-detr"]
CMD ["--help"]
