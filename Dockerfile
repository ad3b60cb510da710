# GPU training: docker build -t fmtrain . && docker run --gpus all --shm-size 8g -v /data:/data fmtrain fit --help
# The wheels of torch bring CUDA; the host needs NVIDIA's driver and container toolkit only.
FROM python:3.13-slim-bookworm

ENV PIP_NO_CACHE_DIR=1 PYTHONUNBUFFERED=1
WORKDIR /opt/repmetrics
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY repmetrics repmetrics
COPY fmtrain fmtrain
RUN pip install --constraint constraints.txt '.[sweep]'

# Folders are mounted by a user of the host: docker run --user "$(id -u):$(id -g)"
ENV HOME=/tmp
WORKDIR /data
ENTRYPOINT ["fmtrain"]
