# docker build -t equipoise .                        # for CPU and GPU
# docker build -t equipoise --build-arg INDEX=… .    # smaller: PyTorch's index for the CPU alone, which its site names
#
# docker run --rm -v "$PWD:/work" equipoise train --data pictures
# docker run --rm -v "$PWD:/work" --gpus all --shm-size 2g equipoise train --data pictures

FROM python:3.12-slim AS build
# PyTorch's index has builds for the CPU alone, which pip takes for newer than the usual ones, and bounds stay those of
# pyproject.toml. The usual builds bring CUDA along as wheels, so that a CUDA image needs no other base.
ARG INDEX=
RUN python -m venv /opt/equipoise
WORKDIR /build
COPY . .
RUN --mount=type=cache,target=/root/.cache/pip \
    /opt/equipoise/bin/pip install --no-compile ${INDEX:+--extra-index-url "$INDEX"} ".[weights,parquet,export]"

FROM python:3.12-slim
COPY --from=build /opt/equipoise /opt/equipoise
# Of the container's toolkit: without it, a GPU is only shown by nvidia-smi.
ENV PATH=/opt/equipoise/bin:$PATH HOME=/home/equipoise NVIDIA_DRIVER_CAPABILITIES=compute,utility
# A user of another number (docker run --user) may write here too: features are kept in ~/.cache.
RUN useradd --uid 1000 --create-home equipoise && mkdir /home/equipoise/.cache && chmod 1777 /home/equipoise /home/equipoise/.cache
USER equipoise
WORKDIR /work
ENTRYPOINT ["equipoise"]
CMD ["--help"]
