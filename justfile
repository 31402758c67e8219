# `just` lists what there is. `just verify` is what CI runs.

_list:
    @just --list --unsorted

# Format, lints and docs: everything that needs no server.
check:
    cargo fmt --all --check
    cargo clippy --workspace --all-targets --all-features -- -D warnings
    RUSTDOCFLAGS="-D warnings" cargo doc --workspace --no-deps --all-features

# Formats, and mends what clippy can mend.
fix:
    cargo clippy --workspace --all-targets --all-features --fix --allow-dirty --allow-staged
    cargo fmt --all

# All tests, or those whose names hold a word: `just test wakes`.
test *FILTER:
    cargo test --workspace --all-features --no-fail-fast -- {{FILTER}}

# The library's tests on another server (valkey-8, redis-8, valkey-9, or a path): `just test-on valkey-9 waiting`.
test-on SERVER *FILTER:
    LEASEHOLD_TEST_REDIS_SERVER={{SERVER}} cargo test --package leasehold --all-features --no-fail-fast -- {{FILTER}}

# The store contract, on every store or on one: `just conformance redis`.
conformance STORE="":
    cargo test --package leasehold --all-features --test 'conformance*' -- {{STORE}}

# What we measure, as ratios within one run.
bench:
    cargo run --release -p leasehold-bench --bin redis
    cargo run --release -p leasehold-bench --bin sqlite
    cargo run --release -p leasehold-bench --bin several

# Everything, after installing what it needs.
verify:
    scripts/test
