# A server of one run, without root. The run is mounted, read-only if you like:
#   docker build -t sagerec .
#   docker run --rm -p 127.0.0.1:8000:8000 -e SAGEREC_TOKEN -v "$PWD/RUN:/run-folder:ro" sagerec
FROM python:3.11-slim

# The PyTorch build, as in the Makefile; this one has no CUDA.
ARG TORCH=torch==2.13.0
ARG TORCH_FLAGS="--index-url https://download.pytorch.org/whl/cpu"
RUN pip install --no-cache-dir ${TORCH} ${TORCH_FLAGS}

WORKDIR /app
COPY pyproject.toml README.md LICENSE ./
COPY src src
RUN pip install --no-cache-dir ".[serve]" && useradd --uid 10001 --no-create-home --shell /usr/sbin/nologin sagerec

USER 10001
ENV PYTHONUNBUFFERED=1 OMP_NUM_THREADS=1
EXPOSE 8000
HEALTHCHECK --start-period=60s CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/ready', timeout=4)"]
ENTRYPOINT ["sagerec", "serve", "/run-folder", "--host", "0.0.0.0"]
