#include "session.h"

namespace internvl::emulator {

Session* session = nullptr;

void Session::find_file(const char* file) {
  last_file_ = file;
  const auto found = file_index_.find(file);
  if (found != file_index_.end()) {
    last_index_ = found->second;
    return;
  }
  last_index_ = static_cast<uint32_t>(files_.size());
  files_.push_back(file);
  file_index_[file] = last_index_;
}

std::string Session::site_text(uint32_t id) const {
  return files_[id >> 16] + ":" + std::to_string(id & 0xffffu);
}

bool Session::skips(Site site) {
  return !options.skip.empty() && site_text(site_id(site)) == options.skip;
}

void Session::report(const std::string& kind, Site site, const std::string& text) {
  Report& entry = reports[kind + " " + text_of(site)];
  if (entry.count++ > 0) return;
  entry.kind = kind;
  entry.text = text_of(site) + ": " + text;
  over = !options.skip.empty();
}

std::string text_of(Site site) { return std::string(site.file) + ":" + std::to_string(site.line); }

}  // namespace internvl::emulator
