"""What the command line does, one module a concern; `gsm_compose.cli` puts them together."""
