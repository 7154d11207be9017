"""Measurements that users and CI run: one module per thing measured, and the facts of the machine they ran on.

Does not belong here: options, tables and files of the command line (hicache_ext.cli.bench).
"""
