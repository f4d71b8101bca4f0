# The commands in a container, run in the folder that is mounted at /data:
#   docker build --tag unet-diffusion .
#   docker run --rm --user "$(id -u):$(id -g)" --volume "$PWD:/data" unet-diffusion train-seg --data data --out runs/mine
# For a GPU: docker build --build-arg TORCH=cu130 ..., and docker run --gpus all --shm-size 2g ...
FROM python:3.11-slim

# Which of PyTorch's builds: cpu, or cu126, cu130, ... for CUDA (https://pytorch.org/get-started).
ARG TORCH=cpu

WORKDIR /src
COPY constraints.txt ./
RUN pip install --no-cache-dir --index-url "https://download.pytorch.org/whl/${TORCH}" \
    "$(grep '^torch==' constraints.txt)"
COPY pyproject.toml README.md LICENSE ./
COPY unet unet
COPY diffusion diffusion
COPY segmentation segmentation
COPY unet_diffusion unet_diffusion
RUN pip install --no-cache-dir --constraint constraints.txt ".[zarr,hdf5,medical]"

# Any user may run it: what is cached (isbi2012, matplotlib's fonts) goes where all may write.
ENV HOME=/tmp
WORKDIR /data
ENTRYPOINT ["unet"]
CMD ["--help"]
