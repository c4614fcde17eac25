"""nginx's configuration: TLS for the clients, and of the SuperLink no more than they need.

Flower's open-source SuperLink serves clients (``/v1/fleet/``) and the command line
(``/v1/control/``) on one port, and asks the command line for no password. So it listens on
loopback, and this proxy passes on what is for clients alone. The SuperLink checks clients' keys
only under TLS of its own: the way over loopback is encrypted once more.
"""

from __future__ import annotations

from fedcompo.deployment.plan import Deployment
from fedcompo.deployment.templates import fill

FLEET = "/v1/fleet/"
LARGEST_BODY = "64m"
"""Flower cuts what it sends into pieces of 5 MiB."""

NGINX = """\
# Paths are relative to this folder: nginx -p FOLDER -c nginx.conf
worker_processes 2;
pid state/nginx.pid;
error_log stderr warn;

events {
    worker_connections 1024;
}

http {
    access_log off;
    server_tokens off;
    # nginx makes these folders; nothing is written to them, see below.
    client_body_temp_path state/tmp/nginx-body;
    proxy_temp_path state/tmp/nginx-proxy;
    fastcgi_temp_path state/tmp/nginx-fastcgi;
    uwsgi_temp_path state/tmp/nginx-uwsgi;
    scgi_temp_path state/tmp/nginx-scgi;

    upstream superlink {
        server 127.0.0.1:@{superlink_port};
        keepalive 32;
    }

    server {
        listen @{port} ssl;
        @{ipv6}listen [::]:@{port} ssl;
        ssl_certificate certificates/server.crt;
        ssl_certificate_key certificates/server.key;
        ssl_protocols TLSv1.2 TLSv1.3;

        # Clients send task vectors in pieces, which go on as they come: none is put on disk.
        client_max_body_size @{largest_body};
        proxy_request_buffering off;
        proxy_buffering off;
        client_body_timeout 300s;
        proxy_read_timeout 300s;
        proxy_send_timeout 300s;

        location @{fleet} {
            limit_except POST {
                deny all;
            }
            proxy_http_version 1.1;
            proxy_set_header Connection "";
            proxy_set_header Host localhost;
            proxy_ssl_verify on;
            proxy_ssl_trusted_certificate certificates/ca.crt;
            proxy_ssl_name localhost;
            # With the path: the SuperLink gets the one that was compared, not the one as sent.
            proxy_pass https://superlink@{fleet};
        }

        # Everything else, above all /v1/control/, which starts runs.
        location / {
            return 403;
        }
    }
}
"""


def nginx_conf(deployment: Deployment) -> str:
    """The text of ``nginx.conf``; IPv6 is a comment unless the server's address is one.

    Where a machine has no IPv6, nginx would not start.
    """
    return fill(
        NGINX,
        ipv6="" if ":" in deployment.server else "# ",
        port=deployment.port,
        superlink_port=deployment.superlink_port,
        fleet=FLEET,
        largest_body=LARGEST_BODY,
    )
