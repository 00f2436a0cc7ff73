# parkdet for the CPU. Not built by CI, which has no Docker.
#
#   docker build -t parkdet .
#   docker run --rm -u "$(id -u):$(id -g)" -v "$PWD:/work" parkdet prepare --data data
#
# Where pip's index offers torch only with CUDA, name one with the CPU wheels (about 3 GB less):
#
#   docker build --build-arg PIP_EXTRA_INDEX_URL=... -t parkdet .
FROM python:3.11-slim

# pip reads it from the environment while the image is built; it does not stay in the image.
ARG PIP_EXTRA_INDEX_URL

WORKDIR /opt/parkdet
COPY pyproject.toml README.md LICENSE ./
COPY constraints constraints
COPY cli cli
COPY train train
COPY export export
COPY runtime runtime
COPY submission submission
COPY configs configs
RUN pip install --no-cache-dir --constraint constraints/cpu.txt '.[train,cpu,report]' \
    && rm -rf build *.egg-info \
    && parkdet doctor

# Commands write to the folder they are started in; caches of libraries go where any user may write.
WORKDIR /work
ENV HOME=/tmp
USER 1000:1000
ENTRYPOINT ["parkdet"]
CMD ["--help"]
