# The image that takes the place of Meridio's proxy image: same user, same
# working directory, same command.
#
#   make image VERSION=v1.2.3

FROM rust:1.95-slim-bookworm AS build
RUN apt-get update \
    && apt-get install -y --no-install-recommends cmake g++ libssl-dev make pkg-config \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY Cargo.toml Cargo.lock build.rs ./
COPY proto proto
COPY src src
COPY tests/lab tests/lab
ARG VERSION=unknown
ENV MERIDIO_PROXY_VERSION=$VERSION
RUN cargo build --locked --release --bin proxy

FROM debian:bookworm-slim
RUN apt-get update \
    && apt-get install -y --no-install-recommends libcap2-bin libssl3 \
    && groupadd --gid 10005 meridio \
    && useradd --uid 10005 --gid 10005 --create-home --home-dir /home/meridio meridio
COPY --from=build /src/target/release/proxy /home/meridio/proxy
# The exec probes of the deployment call this name.
RUN ln -s /home/meridio/proxy /bin/grpc_health_probe \
    # Permitted, not effective: the program also starts where NET_ADMIN is
    # missing, and then says so instead of failing to execute. NET_RAW is for
    # announcing targets' addresses, and may be missing.
    && setcap cap_net_admin,cap_net_raw+p /home/meridio/proxy \
    && apt-get purge -y libcap2-bin && apt-get autoremove -y && rm -rf /var/lib/apt/lists/*
USER 10005:10005
WORKDIR /home/meridio
CMD ["./proxy"]
