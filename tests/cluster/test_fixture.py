"""The Slurm of these tests: several may start at the same time, and one that cannot start says why."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

import slurm as real


def test_no_port_is_given_to_two() -> None:
    taken = [real.take_ports() for _ in range(50)]
    ports = [port for held, nine in taken for port in (held.getsockname()[1], *nine)]
    assert len(set(ports)) == 500
    for held, _ in taken:
        held.close()
    ephemeral = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    assert max(ports) < ephemeral


def test_a_block_with_a_port_that_is_used_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    held, ports = real.take_ports()
    held.close()
    first = ports[0] - 1
    monkeypatch.setattr(real, "PORTS", range(first, first + 10, 10))
    with socket.create_server(("127.0.0.1", ports[4])), pytest.raises(RuntimeError, match=f"from {first} to"):
        real.take_ports()


def test_a_daemon_that_cannot_start_is_named_with_what_it_said(monkeypatch: pytest.MonkeyPatch) -> None:
    thieves = []

    def start_node(self: real.Slurm, name: str) -> None:
        if name == "n3":
            thieves.append(socket.create_server(("127.0.0.1", self.ports[5])))
        start(self, name)

    start = real.Slurm.start_node
    monkeypatch.setattr(real.Slurm, "start_node", start_node)
    with pytest.raises(real.DaemonError, match="n3: exit code 1(?s:.*)Address already in use"), real.cluster():
        pass
    thieves[0].close()
