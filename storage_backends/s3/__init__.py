"""A tier in S3, or a store that speaks its protocol. Needs the extra `s3`."""

from storage_backends.s3.backend import S3Backend, S3Options

__all__ = ["S3Backend", "S3Options"]
