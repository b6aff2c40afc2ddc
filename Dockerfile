# ptq4sam and its runtimes, without the detectors of mmdetection (which are compiled: environment.sh).
#   docker build -t ptq4sam .                        for any CPU
#   docker build --target cuda -t ptq4sam:cuda .     for NVIDIA GPUs; torch brings CUDA's libraries
#   docker run --rm -u "$(id -u):$(id -g)" -v "$PWD:/work" ptq4sam demo
#   docker run --rm --gpus all -u "$(id -u):$(id -g)" -v "$PWD:/work" ptq4sam:cuda evaluate ...
FROM python:3.12-slim AS wheel
WORKDIR /source
COPY . .
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheel .

FROM python:3.12-slim AS base
# The compiler makes reconstruction's kernels, at their first use.
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
COPY constraints.txt /
COPY --from=wheel /wheel /wheel
ENV HOME=/tmp PIP_NO_CACHE_DIR=1
WORKDIR /work
ENTRYPOINT ["ptq4sam"]

FROM base AS cuda
RUN pip install -c /constraints.txt "$(ls /wheel/*.whl)[onnx,openvino,report]"

FROM base AS cpu
RUN pip install -c /constraints.txt --extra-index-url https://download.pytorch.org/whl/cpu \
    "$(ls /wheel/*.whl)[onnx,openvino,report]"
