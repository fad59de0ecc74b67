#include "experiments/results.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>

#include "config_error.hpp"
#include "experiments/progress.hpp"
#include "experiments/row.hpp"
#include "trace_fixture.hpp"

namespace kv {
namespace {

using test::read_file;
using test::TempDir;
using test::write_file;

Row row_of(const std::string& run, const std::string& status) {
  return {{"run", run}, {"status", status}, {"series", true}};
}

TEST(Results, AppendsOneLineARow) {
  TempDir dir;
  Results results(dir / "out");
  results.append(row_of("a", "ok"));
  results.append(row_of("b", "error"));
  EXPECT_EQ(
      read_file(dir / "out/runs.jsonl"),
      "{\"run\":\"a\",\"status\":\"ok\",\"series\":true}\n{\"run\":\"b\",\"status\":\"error\",\"series\":true}\n");
  EXPECT_EQ(results.rows().at("b").status, "error");
  EXPECT_TRUE(results.rows().at("a").series);
}

TEST(Results, CutsOffATornLastLine) {
  TempDir dir;
  const std::string whole = "{\"run\":\"a\",\"status\":\"ok\"}\n";
  for (const char* torn : {"{\"run\":\"b\",\"sta", "{", "{\"run\":\"b\",\"status\":\"ok\",\"nmse\":0.1"}) {
    write_file(dir / "runs.jsonl", whole + torn);
    EXPECT_EQ(read_rows(dir / "").size(), 1u) << "looking changes nothing";
    EXPECT_EQ(read_file(dir / "runs.jsonl"), whole + torn);
    Results results(dir / "");
    EXPECT_EQ(results.rows().size(), 1u);
    results.append(row_of("c", "ok"));
    EXPECT_EQ(read_file(dir / "runs.jsonl"), whole + "{\"run\":\"c\",\"status\":\"ok\",\"series\":true}\n");
  }
}

TEST(Results, KeepsAWholeLastRowWithoutNewline) {
  TempDir dir;
  write_file(dir / "runs.jsonl", "{\"run\":\"a\",\"status\":\"ok\"}");
  Results results(dir / "");
  EXPECT_TRUE(results.rows().contains("a"));
  EXPECT_EQ(read_file(dir / "runs.jsonl"), "{\"run\":\"a\",\"status\":\"ok\"}\n");
}

TEST(Results, NamesALineThatIsNoRow) {
  TempDir dir;
  write_file(dir / "runs.jsonl", "{\"run\":\"a\"}\nhello\n{\"run\":\"b\"}\n");
  const std::string expected =
      (dir / "runs.jsonl").string() + ":2: is not a row of kvreplay; remove the line or choose another --out";
  EXPECT_EQ(config_error([&] { read_rows(dir / ""); }), expected);
  EXPECT_EQ(config_error([&] { Results results(dir / ""); }), expected);
}

std::size_t lines_in(const std::filesystem::path& file) {
  return static_cast<std::size_t>(std::ranges::count(read_file(file), '\n'));
}

TEST(Results, OfRowsOfOneRunTheLastCountsAndCompactingLeavesIt) {
  TempDir dir;
  {
    Results results(dir / "");
    for (const char* run : {"a", "b", "c"}) results.append(row_of(run, "error"));
    results.append(row_of("b", "ok"));
    EXPECT_EQ(results.rows().at("b").status, "ok");
    EXPECT_EQ(lines_in(dir / "runs.jsonl"), 4u) << "the old row is there until it is compacted";
  }
  EXPECT_EQ(read_rows(dir / "").at("b").status, "ok");
  Results results(dir / "");
  results.compact();
  results.append(row_of("d", "ok"));
  const auto line = [](const char* run, const char* status) { return row_of(run, status).dump() + "\n"; };
  EXPECT_EQ(read_file(dir / "runs.jsonl"), line("a", "error") + line("c", "error") + line("b", "ok") + line("d", "ok"));
  EXPECT_EQ(results.rows().size(), 4u);
}

TEST(Results, CompactingRewritesNothingWhenNothingWasReplaced) {
  TempDir dir;
  Results results(dir / "");
  results.append(row_of("a", "ok"));
  const auto file = std::filesystem::file_size(dir / "runs.jsonl");
  std::filesystem::create_directory(dir / "runs.jsonl.part");  // a rewrite would fail
  results.compact();
  EXPECT_EQ(std::filesystem::file_size(dir / "runs.jsonl"), file);
  results.append(row_of("a", "ok"));
  EXPECT_EQ(config_error([&] { results.compact(); }),
            "--out: cannot write " + (dir / "runs.jsonl.part").string() + ": Is a directory");
  EXPECT_EQ(lines_in(dir / "runs.jsonl"), 2u) << "no row is lost when it cannot be done";
}

TEST(Results, AFolderInPlaceOfTheRowsIsOneClearError) {
  TempDir dir;
  std::filesystem::create_directory(dir / "runs.jsonl");
  const std::string expected =
      "--out: " + (dir / "runs.jsonl").string() + " is not a file that can be read; choose another --out";
  EXPECT_EQ(config_error([&] { Results results(dir / ""); }), expected);
  EXPECT_EQ(config_error([&] { read_rows(dir / ""); }), expected);
}

TEST(Results, RemembersWhyARunFailed) {
  TempDir dir;
  Row row = row_of("a", "ok");
  set_failed(row, "t.h5: gone", 3);
  Results(dir / "").append(row);
  const RowState state = read_rows(dir / "").at("a");
  EXPECT_EQ(state.status, "error");
  EXPECT_EQ(state.error, "t.h5: gone");
  EXPECT_EQ(state.error_code, 3);
}

TEST(Results, OneWriterAtATime) {
  TempDir dir;
  const auto first = std::make_unique<Results>(dir / "");
  EXPECT_EQ(config_error([&] { Results second(dir / ""); }),
            "--out: another kvreplay is writing to " + (dir / "").string());
}

TEST(Results, NamesAFolderThatCannotBeMade) {
  TempDir dir;
  write_file(dir / "file", "");
  EXPECT_TRUE(config_error([&] { Results results(dir / "file/out"); }).starts_with("--out: cannot create "));
}

TEST(Results, ARowIsDoneWhenItHasWhatIsAsked) {
  Point point;
  point.keys.series = true;
  point.keys.timing_repeats = 2;
  const RowState full{"ok", true, 2}, no_series{"ok", false, 2}, fewer{"ok", true, 1}, more{"ok", true, 3},
      failed{"error", true, 2};
  EXPECT_TRUE(is_done(point, &full));
  EXPECT_TRUE(is_done(point, &more));
  EXPECT_FALSE(is_done(point, &no_series));
  EXPECT_FALSE(is_done(point, &fewer));
  EXPECT_FALSE(is_done(point, &failed));
  EXPECT_FALSE(is_done(point, nullptr));
}

/// One layer, two heads; a prompt of 4 in blocks of 2, then 2 decoded tokens, all measured from token 3 on.
ReplayResult small_result() {
  ReplayResult r;
  r.layers = 1, r.query_heads = 2, r.kv_heads = 2;
  r.measured = {3, 4, 5};
  r.step_token = {1, 3, 4, 5};
  r.slots = {2, 4, 3, 3, /* second head */ 2, 4, 4, 3};
  r.final_slots = {2, 3};
  r.error2 = {0, 1, 0, 0, 0, 0};
  r.output2 = {4, 4, 4, 4, 4, 4};
  r.cosine = r.lost_mass = std::vector<double>(6, 0.0);
  r.timing_noise = std::nan("");
  return r;
}

TraceHeader small_header() {
  TraceHeader header;
  header.tokens = 6;
  header.prompt_tokens = 4;
  header.layers.resize(1);
  header.layers[0].index = 7;
  return header;
}

TEST(Held, CountsTheMeasuredSteps) {
  const Held held = held_of(small_result(), small_header(), {100, 10, 1});
  EXPECT_DOUBLE_EQ(held.slots_mean, (8 + 7 + 6) / 6.0) << "the first step's block holds no measured token";
  EXPECT_EQ(held.slots_min, 3);
  EXPECT_EQ(held.slots_peak, 4);
  EXPECT_DOUBLE_EQ(held.slots_decode_mean.value(), (7 + 6) / 4.0);
  EXPECT_DOUBLE_EQ(held.cache_mean, 7 * 110 + 2);
  EXPECT_DOUBLE_EQ(held.metadata_mean, 7 * 10 + 2);
  EXPECT_EQ(held.cache_peak, 8u * 110 + 2);
  EXPECT_EQ(held.cache_final, 5u * 110 + 2);
  EXPECT_EQ(held.full, 2u * 6 * 104);
  EXPECT_DOUBLE_EQ(held.full_mean, 2 * 5 * 104) << "4, 5 and 6 tokens at the measured steps";
}

TEST(Held, WithoutDecodeThereIsNoDecodeMean) {
  TraceHeader header = small_header();
  header.prompt_tokens = 6;
  EXPECT_FALSE(held_of(small_result(), header, {100, 10, 1}).slots_decode_mean.has_value());
}

Point small_point() {
  return resolve(expand(parse_config("trace: t.h5\npolicy: h2o\nbudget: 50%\nbackend: cpu\n", "c", {}))).at(0);
}

TEST(Row, IsFlatAndSaysNullForUndefined) {
  const Point point = small_point();
  Row row = make_row(point, small_header(), "ok", "");
  const ReplayResult result = small_result();
  add_result(row, point, small_header(), result, metrics_of(result), {});
  add_cost(row, {1.5, 2, ""});
  for (const auto& [key, value] : row.items()) EXPECT_FALSE(value.is_object()) << key;
  EXPECT_EQ(row["status"], "ok");
  EXPECT_TRUE(row["error"].is_null());
  EXPECT_EQ(row["policy.recent"], 0.5);
  EXPECT_EQ(row["layers"], Row({7}));
  EXPECT_NEAR(row["nmse"].get<double>(), std::sqrt(1.0 / 24), 1e-12);
  EXPECT_EQ(row["sums.error2"], Row({{1.0, 0.0}}));
  for (const char* key : {"noise_floor.nmse", "us.attend.p50", "us.step.p95", "us.policy_overhead", "us.noise"})
    EXPECT_TRUE(row[key].is_null()) << key;
  EXPECT_FALSE(row.contains("rel_l2_wo.mean"));
  EXPECT_FALSE(row["acted"].get<bool>());
  EXPECT_EQ(row["seconds"], 1.5);
  EXPECT_EQ(row["threads"], 2);
  EXPECT_TRUE(row["device"].is_null()) << "on the CPU";
}

TEST(Row, KeepsWhatWasMeasuredWhenItFails) {
  const Point point = small_point();
  Row row = make_row(point, small_header(), "ok", "");
  EXPECT_TRUE(row["error.code"].is_null());
  add_result(row, point, small_header(), small_result(), metrics_of(small_result()), {});
  set_failed(row, "no space", 2);
  add_cost(row, {1.5, 2, "H100"});
  EXPECT_EQ(row["status"], "error");
  EXPECT_EQ(row["error"], "no space");
  EXPECT_EQ(row["error.code"], 2);
  EXPECT_TRUE(row["nmse"].is_number());
  EXPECT_EQ(row["device"], "H100");
  EXPECT_EQ(row["seconds"], 1.5);
}

TEST(Row, BudgetSlotsAreNeverMoreThanTokens) {
  Point point = small_point();
  for (const auto& [slots, shown] : {std::pair{4, 4}, {6, 6}, {2147483647, 6}}) {
    point.settings.budget = slots;
    EXPECT_EQ(make_row(point, small_header(), "ok", "")["budget_slots"], shown);
  }
}

TEST(Row, SumsPhasesPerStep) {
  const Point point = small_point();
  ReplayResult result = small_result();
  result.us = {{1, 1}, {10, 20}, {2, 2}, {1, 1}, {1, 1}, {1, 1}};
  result.timing_noise = 0.25;
  Row row = make_row(point, small_header(), "ok", "");
  add_result(row, point, small_header(), result, metrics_of(result), {0.1, 0.2});
  EXPECT_EQ(row["us.attend.p50"], 15.0);
  EXPECT_EQ(row["us.step.p50"], 21.0);
  EXPECT_NEAR(row["us.policy_overhead"].get<double>(), 5.0 / 15, 1e-12);
  EXPECT_EQ(row["us.noise"], 0.25);
  EXPECT_EQ(row["noise_floor.rel_l2.mean"], 0.2);
}

TEST(Row, NumbersReadBackToTheSameBits) {
  for (const double x : {0.1, 1.0 / 3, 1e-300, 0.1 + 0.2, 5e-324})
    EXPECT_EQ(Row::parse(Row(x).dump()).get<double>(), x);
}

TEST(Progress, HumanNumbers) {
  EXPECT_EQ(human_bytes(0), "0 B");
  EXPECT_EQ(human_bytes(1023), "1023 B");
  EXPECT_EQ(human_bytes(12595), "12.3 KiB");
  EXPECT_EQ(human_bytes(3.5 * 1024 * 1024 * 1024), "3.5 GiB");
  EXPECT_EQ(human_seconds(0.414), "0.41 s");
  EXPECT_EQ(human_seconds(38.2), "38 s");
  EXPECT_EQ(human_seconds(190), "3 min 10 s");
  EXPECT_EQ(human_seconds(7500), "2 h 5 min");
}

}  // namespace
}  // namespace kv
