# A job of the batch on Kubernetes (docs/cluster.md): what `make` installs, without its .venv.
#     docker build -t IMAGE .
FROM python:3.11-slim-bookworm
RUN useradd --create-home user && mkdir /workdir && chown user /workdir
WORKDIR /opt/mtprune
# First what changes seldom.
COPY requirements.lock requirements-kubernetes.lock ./
RUN pip install --no-cache-dir --require-hashes -r requirements.lock \
 && pip install --no-cache-dir --no-deps --require-hashes -r requirements-kubernetes.lock
COPY . .
RUN pip install --no-cache-dir --no-deps --no-build-isolation -e .
ENV OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 PYTHONUTF8=1
USER user
WORKDIR /workdir
