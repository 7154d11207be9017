"""obstore's client of one bucket, as the options ask for it. Connects to nothing yet.

Does not belong here: objects, pages.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from obstore.store import S3Store

from storage_backends.s3.options import S3Options

_RETRIES = 3


def open_store(options: S3Options) -> S3Store:
    """Raises OptionError where a credential is not where it should be."""
    limit = timedelta(seconds=options.timeout)
    client: dict[str, Any] = {"timeout": limit, "connect_timeout": min(limit, timedelta(seconds=5))}
    if options.allow_http:
        client["allow_http"] = True
    if options.tls_ca is not None:
        client["root_certificate"] = options.tls_ca.read_bytes()
    config: dict[str, Any] = {"region": options.region, **options.credentials()}
    if options.endpoint:
        config["endpoint"] = options.endpoint
    if not options.endpoint.startswith("http:"):
        config["unsigned_payload"] = True  # TLS and our own checksums cover it; hashing it again is the CPU's time
    return S3Store(
        options.bucket,
        client_options=client,
        retry_config={"max_retries": _RETRIES, "retry_timeout": limit},
        **config,
    )
