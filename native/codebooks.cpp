// See codebooks.h. Compiled for the lowest processor.
#include "codebooks.h"

#include <algorithm>
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>

namespace quantkit {

namespace {

struct Entry {
    std::vector<int8_t> values;
    Codebook book;
};

struct Registry {
    std::mutex lock;
    std::map<std::string, Entry, std::less<>> entries;  // nodes never move
};

// Never destroyed: kernels may still run in other threads while the process ends.
Registry& registry() {
    static Registry* const one = new Registry;
    return *one;
}

}  // namespace

void set_codebook(const char* name, const int8_t* values, size_t n, size_t k) {
    Registry& r = registry();
    const std::lock_guard<std::mutex> guard(r.lock);
    const auto found = r.entries.find(name);
    if (found == r.entries.end()) {
        Entry& entry = r.entries[name];
        entry.values.assign(values, values + n * k);
        entry.book = {n, k, entry.values.data()};
        return;
    }
    const Codebook& old = found->second.book;
    if (old.n != n || old.k != k || !std::equal(values, values + n * k, old.values))
        throw std::invalid_argument(std::string("set_codebook: there is another codebook ") + name);
}

const Codebook& codebook(const char* name, size_t n, size_t k) {
    Registry& r = registry();
    const std::lock_guard<std::mutex> guard(r.lock);
    const auto found = r.entries.find(name);
    if (found == r.entries.end())
        throw std::logic_error(std::string("quantize: the codebook ") + name + " has not been set");
    const Codebook& book = found->second.book;
    if (book.n != n || book.k != k)
        throw std::logic_error(std::string("quantize: the codebook ") + name + " has another shape");
    return book;
}

}  // namespace quantkit
