# The laboratory from Debian's packages and its own wheel:
#   docker build -t nbhelpers . && docker run --rm -p 8888:8888 -v "$PWD/outputs:/lab/outputs" nbhelpers
FROM debian:trixie-slim AS wheel
RUN apt-get update \
    && apt-get install -y --no-install-recommends python3-pip python3-venv \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /source
COPY . .
RUN python3 -m venv /build && /build/bin/pip wheel --no-cache-dir --no-deps --wheel-dir /wheel .

FROM debian:trixie-slim
RUN apt-get update \
    && apt-get install -y --no-install-recommends python3 python3-venv \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home lab
COPY --from=wheel /wheel /wheel
COPY constraints.txt /wheel/
# The CPU's build of PyTorch is a tenth of the one with CUDA.
RUN python3 -m venv /venv \
    && /venv/bin/pip install --no-cache-dir -c /wheel/constraints.txt \
        --extra-index-url https://download.pytorch.org/whl/cpu "$(echo /wheel/*.whl)[concepts,applications]" \
    && /venv/bin/nbhelpers lab /lab \
    && mkdir -p /lab/outputs \
    && chown -R lab: /lab
ENV PATH=/venv/bin:$PATH PYTHONPATH=/lab
USER lab
WORKDIR /lab
EXPOSE 8888
CMD ["jupyter", "lab", "--ip=0.0.0.0", "--no-browser", "notebooks/00_start_here.ipynb"]
