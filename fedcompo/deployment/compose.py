"""Docker Compose files: the same start scripts in images that are built from the project."""

from __future__ import annotations

from fedcompo.deployment.plan import Deployment
from fedcompo.deployment.templates import fill

IMAGE = """\
    build:
      # A checkout of the project; no file of this folder enters the image.
      context: ${PROJECT:?Set PROJECT to a checkout of fedcompo}
      dockerfile_inline: |
        FROM python:3.12-slim
        COPY . /project
        RUN pip install --no-cache-dir /project && rm -rf /project
"""

CAGE = """\
    read_only: true
    tmpfs: [/tmp]
    cap_drop: [ALL]
    security_opt: ["no-new-privileges:true"]
    # Who owns this folder, and so may read its keys.
    user: "${USER_ID:-1000}:${GROUP_ID:-1000}"
"""

CLIENT = (
    """\
# PROJECT=/path/of/fedcompo docker compose --env-file client.conf up -d
# With a GPU: docker compose --env-file client.conf -f compose.yaml -f compose.gpu.yaml up -d
services:
  client:
    image: fedcompo
"""
    + IMAGE
    + CAGE
    + """\
    command: [/client/start]
    # A client that was killed is refused until its session has expired: Docker's delay grows.
    restart: always
    mem_limit: ${MEMORY}
    memswap_limit: ${MEMORY}
    volumes:
      - .:/client:ro
      - ./state:/client/state
      - ${DATA}:${DATA}:ro
"""
)

GPU = """\
# Laid over compose.yaml: gives the client the machine's GPUs.
services:
  client:
    deploy:
      resources:
        reservations:
          devices:
            - driver: nvidia
              count: all
              capabilities: [gpu]
"""

SERVER = (
    """\
# PROJECT=/path/of/fedcompo docker compose up -d
# A run: docker compose exec superlink /server/run
services:
  superlink:
    image: fedcompo
"""
    + IMAGE
    + CAGE
    + """\
    command: [/server/start-superlink]
    restart: always
    # The proxy shares this network: the SuperLink's own port stays within, on loopback.
    ports: ["@{port}:@{port}"]
    volumes:
      - .:/server:ro
      - ./state:/server/state
      - ./runs:/server/runs
  # Once there is one: docker compose --profile registry up -d
  registry:
    image: fedcompo
    profiles: [registry]
"""
    + CAGE
    + """\
    command: [/server/start-registry]
    restart: always
    ports: ["@{registry_port}:@{registry_port}"]
    volumes:
      - .:/server:ro
      - ./state:/server/state
      - ./runs:/server/runs
  proxy:
    image: nginx:stable
"""
    + CAGE
    + """\
    command: [/server/start-proxy]
    restart: always
    network_mode: service:superlink
    volumes:
      - .:/server:ro
      - ./state:/server/state
"""
)


def client_compose() -> dict[str, str]:
    """A client's compose files, by file name."""
    return {"compose.yaml": CLIENT, "compose.gpu.yaml": GPU}


def server_compose(deployment: Deployment) -> dict[str, str]:
    """The server's compose file, by file name."""
    return {
        "compose.yaml": fill(SERVER, port=deployment.port, registry_port=deployment.registry_port)
    }
