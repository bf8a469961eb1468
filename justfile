# The commands people use; `just` lists them.

default:
    @just --list

# Run the contract on the simulated backend under many seeds
contract seeds="1000":
    cargo run --release -p vm-dst -- run --seeds {{ seeds }}

# Run all tests; DST_SEED=0x2a or DST_SEEDS=n choose the seeds
test:
    cargo test --workspace

# Run the contract and leave one page that shows what came of it
report file="target/report.html" seeds="100":
    cargo run --release -p vm-dst -- run --seeds {{ seeds }} --report {{ file }}

# Look at the report's page in a browser, as CI does
report-browser:
    cargo test -p vm-dst --test report
    dst-tests/tests/report/browser target/tmp/report.html

# Show one run as a timeline
replay seed clause:
    cargo run --release -p vm-dst -- replay --seed {{ seed }} --clause {{ clause }}

# Measure the simulator
bench:
    cargo run --release -p vm-dst -- bench

# Check format, lints and documentation
lint:
    cargo fmt --all --check
    cargo clippy --workspace --all-targets -- -D warnings
    RUSTDOCFLAGS="-D warnings --cfg madsim" cargo doc --workspace --no-deps

# Write docs/contract.md from the clause registry
contract-doc:
    cargo run -p vm-dst -- clauses --markdown > docs/contract.md

# Hold the contract against every planted bug
mutants:
    cargo run --release -p vm-dst --features planted-bugs -- mutants

# Count what happens under 1,000 seeds, and name what never does
coverage:
    cargo run --release -p vm-dst -- coverage

# Write the documents of planted bugs and of what is possible
catalogue-docs:
    cargo run -p vm-dst -- mutants --markdown > docs/planted-bugs.md
    cargo run -p vm-dst -- coverage --markdown > docs/coverage.md

# Run a command inside a Linux that offers /dev/kvm, on any machine
lab *command:
    lab/run {{ command }}

# Hold machines of KVM to the contract, in the lab
lab-contract seeds="1":
    lab/contract --backend kvm --seeds {{ seeds }}

# Check the lab itself
lab-selftest:
    lab/selftest

# Run what CI runs
ci:
    bash .ci/run
