// The command line of kvreplay. Everything that goes wrong below ends here as one line on stderr and an exit code.
#include <fmt/core.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <string>
#include <vector>

#include "core/budget.hpp"
#include "core/error.hpp"
#include "experiments/bench.hpp"
#include "experiments/docs.hpp"
#include "experiments/inspect.hpp"
#include "experiments/runner.hpp"
#include "experiments/synth.hpp"
#include "experiments/version.hpp"

namespace {

constexpr int usage_error = 2;

void add_run(CLI::App& app, kv::RunOptions& options, std::string& out, std::string& device_memory) {
  CLI::App* run = app.add_subcommand("run", "run a sweep; what its output folder already has is not run again");
  run->add_option("config", options.config, "a YAML file such as configs/quickstart.yaml")->required();
  run->add_option("overrides", options.overrides, "key=value, replaces what the file says of key; the value is YAML");
  run->add_option("--out", out, "output folder (default: out/<name of the config>)");
  run->add_option("--only", options.only, "key=value, run only points with it; repeatable")->allow_extra_args(false);
  run->add_option("--jobs", options.jobs, "worker threads (default: one per core); results do not depend on it")
      ->check(CLI::Range(1, 4096));
  run->add_option("--device-memory", device_memory,
                  "memory of each GPU to stay below, such as 8GiB (default: nine tenths of what is free)");
  run->add_flag("--dry-run", options.dry_run,
                "print the points, which are done and the memory they need; write nothing");
  run->add_flag("--force", options.force, "run everything again and replace the rows");
  run->add_flag("--retry-failed", options.retry_failed, "run points again whose row has status error");
}

void add_synth(CLI::App& app, std::string& file, kv::Synthetic& s, std::string& dtype) {
  CLI::App* synth = app.add_subcommand("synth", "write a made-up trace of any shape");
  const CLI::Range counts(1, 1 << 24);
  synth->add_option("file", file, "the trace to write")->required();
  synth->add_option("--layers", s.layers)->check(counts)->capture_default_str();
  synth->add_option("--query-heads", s.query_heads)->check(counts)->capture_default_str();
  synth->add_option("--kv-heads", s.kv_heads)->check(counts)->capture_default_str();
  synth->add_option("--head-dim", s.head_dim)->check(CLI::Range(1, 4096))->capture_default_str();
  synth->add_option("--tokens", s.tokens)->check(counts)->capture_default_str();
  synth->add_option("--prompt", s.prompt_tokens, "tokens of them before decode")
      ->check(CLI::Range(0, 1 << 24))
      ->capture_default_str();
  synth->add_option("--dtype", dtype)->check(CLI::IsMember({"float16", "bfloat16", "float32"}))->capture_default_str();
  synth->add_flag("--rope,!--no-rope", s.rope, "rotary position embedding (default: yes)");
  synth->add_option("--sinks", s.sinks, "first tokens that every query attends to")
      ->check(CLI::Range(0, 1 << 24))
      ->capture_default_str();
  synth->add_option("--heavy", s.heavy, "share of tokens that every query attends to more")
      ->check(CLI::Range(0.0, 1.0))
      ->capture_default_str();
  synth->add_option("--correlation", s.correlation, "of neighbouring keys")
      ->check(CLI::Range(0.0, 1.0))
      ->capture_default_str();
  synth->add_option("--outliers", s.outliers, "key channels with a large mean")
      ->check(CLI::Range(0, 4096))
      ->capture_default_str();
  synth->add_option("--seed", s.seed)->capture_default_str();
}

void add_bench(CLI::App& app, kv::BenchOptions& options) {
  CLI::App* bench = app.add_subcommand("bench", "time the engines against what they cannot go below");
  bench->add_option("--only", options.only, "rows whose name contains this");
  bench->add_option("--json", options.json, "a file that gets the rows too");
  bench->add_option("--peers", options.peers,
                    "what tests/bench/peers.py wrote on the same machine: floors that need it");
}

std::vector<std::string> commands_of(const CLI::App& app) {
  std::vector<std::string> names;
  for (const CLI::App* command : app.get_subcommands({})) names.push_back(command->get_name());
  return names;
}

/// "; did you mean '--dry-run'?" for the first option of the command that it does not have.
std::string option_hint(const CLI::App& app, const std::vector<std::string>& argv) {
  std::vector<std::string> names;
  for (const CLI::App* command : app.get_subcommands())
    for (const CLI::Option* option : command->get_options()) names.push_back(option->get_name());
  for (const std::string& word : argv) {
    const std::string name = word.substr(0, word.find('='));
    if (name.starts_with("--") && std::find(names.begin(), names.end(), name) == names.end())
      return kv::did_you_mean(name, names);
  }
  return "";
}

/// One line for a wrong command line; help and version are no errors.
int report_usage(const CLI::App& app, const CLI::ParseError& error, const std::vector<std::string>& argv) {
  if (error.get_exit_code() == 0) return app.exit(error);
  std::string message = error.what() + option_hint(app, argv);
  if (argv.size() > 1 && app.get_subcommands().empty() && !argv[1].starts_with("-"))
    message = fmt::format("no command is called '{}'{}", argv[1], kv::did_you_mean(argv[1], commands_of(app)));
  std::replace(message.begin(), message.end(), '\n', ' ');
  fmt::print(stderr, "kvreplay: {} (kvreplay --help shows more)\n", message);
  return usage_error;
}

struct Request {
  kv::RunOptions run;
  std::string out, device_memory, policy, trace, page, dtype = "bfloat16";
  kv::Synthetic synthetic;
  kv::BenchOptions bench;
  bool markdown = false;
};

/// The bytes that `text` spells as a budget in bytes would.
std::size_t device_memory_of(const std::string& text) {
  try {
    const kv::Budget size = kv::parse_budget(text);
    if (size.kind == kv::Budget::Kind::bytes && size.amount > 0) return static_cast<std::size_t>(size.amount);
  } catch (const kv::ConfigError&) {  // its message is about budgets
  }
  throw kv::ConfigError(fmt::format("--device-memory: expected bytes such as 8GiB or 512MiB, got '{}'", text));
}

int run(const CLI::App& command, Request& request) {
  if (command.count("--out") > 0) {
    if (request.out.empty()) throw kv::ConfigError("--out: expected a folder, got ''");
    request.run.out = request.out;
  }
  if (command.count("--device-memory") > 0) request.run.device_memory = device_memory_of(request.device_memory);
  return kv::run_sweep(request.run);
}

int execute(const CLI::App& app, Request& request) {
  if (app.got_subcommand("run")) return run(*app.get_subcommand("run"), request);
  if (app.got_subcommand("bench")) {
    kv::bench(request.bench);
  } else if (app.got_subcommand("synth")) {
    request.synthetic.dtype = request.dtype == "float16"    ? kv::Dtype::float16
                              : request.dtype == "bfloat16" ? kv::Dtype::bfloat16
                                                            : kv::Dtype::float32;
    kv::synth(request.trace, request.synthetic);
  } else if (app.got_subcommand("inspect")) {
    kv::inspect(request.trace);
  } else if (app.got_subcommand("docs")) {
    fmt::print("{}", request.page == "policies"  ? kv::policies_markdown()
                     : request.page == "metrics" ? kv::metrics_markdown()
                                                 : kv::configs_markdown());
  } else if (request.policy.empty()) {
    fmt::print("{}", request.markdown ? kv::policies_markdown() : kv::policies_text());
  } else {
    const kv::PolicyEntry& entry = kv::find_policy(request.policy);
    fmt::print("{}", request.markdown ? kv::policy_markdown(entry) : kv::policy_text(entry));
  }
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  CLI::App app("Replays recorded attention of a language model under KV-cache policies.", "kvreplay");
  Request request;
  request.run.argv.assign(argv, argv + argc);
  app.set_version_flag("--version", fmt::format("kvreplay {} ({})", kv::build::version, kv::build::git_sha));
  app.require_subcommand(1);
  add_run(app, request.run, request.out, request.device_memory);
  add_bench(app, request.bench);
  add_synth(app, request.trace, request.synthetic, request.dtype);
  CLI::App* policies = app.add_subcommand("policies", "list the policies, or show one with its parameters");
  policies->add_option("name", request.policy, "a policy");
  policies->add_flag("--markdown", request.markdown, "as Markdown");
  app.add_subcommand("inspect", "show what a trace holds and what cannot run on it")
      ->add_option("trace", request.trace, "a trace file")
      ->required();
  app.add_subcommand("docs", "print a page that is made from the code")
      ->add_option("page", request.page, "policies, metrics or configs")
      ->required()
      ->check(CLI::IsMember({"policies", "metrics", "configs"}));
  try {
    app.parse(argc, argv);
    return execute(app, request);
  } catch (const CLI::ParseError& error) {
    return report_usage(app, error, request.run.argv);
  } catch (const std::exception& error) {
    fmt::print(stderr, "kvreplay: {}\n", error.what());
    return kv::exit_code(error);
  }
}
