"""How long certificates hold: a warning sixty days before one ends, a sentence when it has ended.

TLS says of a certificate that has ended no more than that the handshake failed.
"""

from __future__ import annotations

import datetime
import os
import shlex
import socket
import ssl
from pathlib import Path

from cryptography import x509
from cryptography.x509.oid import NameOID

from fedcompo.errors import ConfigError
from fedcompo.names import printable
from fedcompo.service.certificates import SERVER, Credential, common_name

SOON = datetime.timedelta(days=60)
"""How long before its end a certificate is warned of."""
PROBE_SECONDS = 5.0
"""How long a look at a server's certificate may take."""
EXPIRED = 10
"""OpenSSL's X509_V_ERR_CERT_HAS_EXPIRED."""
PROXIES = "grpc_proxy", "https_proxy", "http_proxy"
"""Environment variables by which gRPC finds a proxy; nothing else may get through there."""
RENEWED = "Who keeps the authority renews it: `fedcompo init-deployment DIR --renew"


def endings(authority: bytes, credential: Credential) -> tuple[str, ...]:
    """Warn of the certificates that end within sixty days: the holder's own, and the authority's.

    Raises:
        ConfigError: If one has ended, or has not begun.
    """
    trusted = x509.load_pem_x509_certificates(authority)
    lasting = max(trusted, key=lambda certificate: certificate.not_valid_after_utc)
    return tuple(filter(None, map(require_current, (lasting, credential.parsed))))


def require_current(certificate: x509.Certificate) -> str:
    """Check that a certificate holds today; returns a warning if it ends soon, else nothing.

    Raises:
        ConfigError: If it has ended, or has not begun.
    """
    now = datetime.datetime.now(datetime.UTC)
    begin, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    whose, remedy = _whose(certificate)
    if now < begin:
        raise ConfigError(
            f"{whose} begins on {begin:%Y-%m-%d}, but this machine's clock says {now:%Y-%m-%d}. "
            "Set the clock."
        )
    if now > end:
        raise ConfigError(f"{whose} ended on {end:%Y-%m-%d}. {remedy}")
    if end - now > SOON:
        return ""
    return f"{whose} ends on {end:%Y-%m-%d}, in {(end - now).days} days. {remedy}"


def server_ending(address: str, authority: Path, certificate: Path, key: Path) -> str:
    """Look at the certificate of a server that listens; returns a warning if it ends soon.

    Nothing is said where it cannot be looked at: nobody listens, a proxy is between, or TLS fails
    for another reason. The call that follows fails then, and says why.

    Args:
        address: Its ``host:port``.
        authority: File of the authority's certificate.
        certificate: File of the caller's own certificate.
        key: File of its key.

    Raises:
        ConfigError: If the server's certificate has ended.
    """
    if any(os.environ.get(variable) for variable in PROXIES):
        return ""
    host, _, port = address.rpartition(":")
    host = host.strip("[]")
    try:
        context = ssl.create_default_context(cafile=authority)
        context.load_cert_chain(certificate, key)
        context.set_alpn_protocols(["h2"])
        with (
            socket.create_connection((host, int(port)), PROBE_SECONDS) as near,
            context.wrap_socket(near, server_hostname=host) as secured,
        ):
            shown = secured.getpeercert(binary_form=True) or b""
    except ssl.SSLCertVerificationError as error:
        if error.verify_code == EXPIRED:
            raise ConfigError(
                f"The certificate of the server at {address} has ended. {RENEWED} server`; then "
                "the server is started again."
            ) from error
        return ""
    except (OSError, ValueError):
        return ""
    return require_current(x509.load_der_x509_certificate(shown))


def _whose(certificate: x509.Certificate) -> tuple[str, str]:
    """Whose certificate it is, and what to do at its end."""
    name = common_name(certificate)
    role = common_name(certificate, NameOID.ORGANIZATIONAL_UNIT_NAME)
    if certificate.subject == certificate.issuer:
        return "The authority's certificate", "All others end with it: make a new deployment."
    if role == SERVER:
        return "The server's certificate", f"{RENEWED} {SERVER}`."
    return f"The certificate of {printable(name)}", f"{RENEWED} {shlex.quote(printable(name))}`."
