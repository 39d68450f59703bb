"""The record, the coordinator and its workers. Never imports torch."""
