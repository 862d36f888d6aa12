# rlt_jax in a container, for CPUs, NVIDIA GPUs and TPUs; see docs/pods.md, "Container".
#
#   docker build --tag=rlt_jax .                                  # CPU
#   docker build --tag=rlt_jax:cuda --build-arg EXTRA=cuda13 .    # an extra of setup.py
#   docker run --rm rlt_jax                                       # the quickstart
#
# The slim image of the current Debian is enough, because no dependency has to be compiled.
# CUDA's libraries and libtpu come with JAX's wheels; drivers are the host's.
FROM python:3.13-slim-trixie

# cpu, or an extra of setup.py: cuda13, cuda12, tpu, or dev for the tests.
ARG EXTRA=cpu
# RUN_AS=root where only root can use the devices or the mounted storage.
ARG RUN_AS=rlt

# Without NVIDIA_VISIBLE_DEVICES, enroot does not mount the driver into the container.
# https://github.com/NVIDIA/enroot/blob/master/conf/hooks/98-nvidia.sh
ENV PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore PYTHONUNBUFFERED=1 \
    NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility

RUN useradd --create-home --uid=1000 rlt && \
    install --directory --owner=rlt --group=rlt /app
WORKDIR /app

# Dependencies have a layer of their own, which is built again only if setup.py changes.
# pip only warns about an extra that does not exist.
COPY setup.py ./
RUN touch README.md LICENSE && \
    if [ "$EXTRA" = cpu ]; then pip install .; \
    elif grep -q "\"$EXTRA\":" setup.py; then pip install ".[$EXTRA]"; \
    else echo "EXTRA=$EXTRA: not cpu and not an extra of setup.py" >&2; exit 2; fi

COPY --chown=rlt:rlt . ./
RUN pip install --no-deps --editable .

USER ${RUN_AS}
CMD ["python", "-m", "rlt_jax.main", "--config=configs/quickstart.py", "--workdir=runs/quickstart"]
