-- KEYS: the locks of all claims, then their fences. ARGV: the owner of each claim, then the record of each, the ttl ms of
-- each and the wish of each; or, if those are the same for all, one record, one ttl and one wish. A wish is empty (no
-- waiting, one token), or how many tokens, or that and how to wait: process, ms that it counts as alive, attempt, longest line
-- or -, and an a if it may stand in line already. Right after the number of tokens may stand @ and the token that the claim
-- proposes: it is taken if it is larger than the last one and not more than an hour ahead; if no last one is known, not
-- more than an hour behind.
-- Answers for each (alone: without a list): the token of a new grant, or {value, remaining ms} of what is there already,
-- and if it waits in line, {value, remaining ms, how many are ahead, since when in us}; or an error.
local call, pcall, sub = redis.call, redis.pcall, string.sub
local count = #KEYS / 2
local time = call('TIME')
local now, now_text = time[1] * 1000000 + time[2], time[1] .. sub('00000' .. time[2], -6)
local hour = now - now % 3600000000

-- Makes what the holder proposes the token of its hold. Answers the lock's value, or an error. The fence first: no token is
-- in use that the fence does not know of; if the rest fails a number is lost and nothing else.
local function raise(lock, fence, value, ballot, text, tokens)
  local last = pcall('GET', fence)
  local digits, marks = string.match(type(last) == 'string' and last or '', '^(%d+)(!?~?%d*)$')
  local head, old, record = string.match(value, '^(lh1:%x+[:!])(%d+)(:.*)$')
  if (last and not digits) or not head or tonumber(old) >= ballot then return value end
  if digits and tonumber(digits) >= ballot then return value end
  local kept = string.format('%.0f', ballot + tokens - 1) .. (marks or '')
  local set = digits and pcall('SET', fence, kept, 'KEEPTTL') or pcall('SET', fence, kept, 'NX', 'PX', '90000000')
  if not set or set.err then return set or redis.error_reply('BADFENCE token') end
  set = pcall('SET', lock, head .. text .. record, 'KEEPTTL')
  if set.err then return set end
  return head .. text .. record
end

local function take(lock, fence, last, owner, record, ttl, wish)
  local token, text, tail = now, now_text, ''
  local number = type(last) == 'string' and tonumber(last)
  local value, claim, ballot, ballot_text
  if wish ~= '' then
    local tokens, rest
    tokens, ballot_text, rest = string.match(wish, '^(%d+)@(%d+)(.*)$')
    if tokens then
      ballot, wish = tonumber(ballot_text), tokens .. rest
      if not (ballot <= now + 3600000000 and ballot + tokens - 1 <= 9007199254740991) then ballot = nil end
    end
  end
  if not number then
    local error
    claim, value = sub(owner, 5, 36), pcall('GET', lock)
    -- In the common case of a line somebody has the lock, and this claim is no late one: tombstones are marked.
    if not (value and type(last) == 'string' and string.find(last, '^%d+!$')) then
      error, number, tail = line('in turn', now_text, lock, fence, claim, value, wish, ttl, record)
      if error then return error end
      if not value then
        value = pcall('GET', lock)
        -- It may have joined the line just now, and then somebody before it was handed the lock.
        if string.find(wish, ' ', 1, true) and sub(wish, -2) ~= ' a' then wish = wish .. ' a' end
      end
    end
  end
  if number and not (number < now) then
    token = number + 1
    text = string.format('%.0f', token)
  end
  -- Without a last token to compare with, one of the past could be smaller than what was given out before that was forgotten.
  if ballot and ballot > (number or now - 3600000000) then token, text = ballot, ballot_text end
  local stored, kept_text = token, text
  if wish ~= '' and sub(wish, 1, 2) ~= '1 ' then
    stored = token + tonumber(string.match(wish, '^%d+')) - 1
    kept_text = string.format('%.0f', stored)
  end
  if not (stored <= 9007199254740991 and token % 1 == 0) then return redis.error_reply('BADFENCE token') end
  if tail ~= '' then
    kept_text = kept_text .. tail
    if sub(tail, 1, 1) == '!' then owner = sub(owner, 1, 36) .. '!' end
  end
  local set = not value and pcall('SET', lock, owner .. text .. ':' .. record, 'NX', 'PX', ttl)
  if not set then
    -- Somebody has it.
    value = value or pcall('GET', lock)
    if type(value) ~= 'string' then return redis.error_reply('WRONGTYPE lock') end
    if ballot and sub(value, 1, 36) == sub(owner, 1, 36) then
      -- It has the lock already: what it proposes becomes the token, if that is larger than the last one.
      value = raise(lock, fence, value, ballot, ballot_text, string.match(wish, '^%d+'))
      if type(value) == 'table' then return value end
    end
    local answer = {sub(value, 1, 4300), call('PTTL', lock)}
    if sub(value, 1, 36) ~= sub(owner, 1, 36) and string.find(wish, ' ', 1, true) then
      local ahead, since = line('enqueue', now_text, lock, fence, sub(owner, 5, 36), value, wish, ttl, record)
      if type(ahead) == 'table' then return ahead end
      answer[3], answer[4] = ahead, since
    end
    return answer
  end
  if set.err then return set end
  if number and number - number % 3600000000 == hour and #ttl <= 7 then
    -- 25 hours, renewed by the first grant of each hour, are 24 at least; keeping what is set is cheaper.
    set = pcall('SET', fence, kept_text, 'KEEPTTL')
  else
    local kept = '90000000'
    if #ttl > 7 and ttl * 2 > 90000000 then kept = string.format('%.0f', ttl * 2) end
    -- A token that is ahead of the clock is kept until the clock has caught up.
    if stored > now then kept = string.format('%.0f', kept + (stored - now) / 1000) end
    if number then
      set = pcall('SET', fence, kept_text, 'PX', kept)
    else
      -- MGET shows a key of another type as none, and NX will not overwrite it.
      set = pcall('SET', fence, kept_text, 'NX', 'PX', kept)
    end
  end
  if not set or set.err then
    call('DEL', lock)
    return set or redis.error_reply('BADFENCE token')
  end
  return token
end

if count == 1 then
  -- For one claim GET is cheaper than MGET. Its error says that the key is of another type, or that a right is lacking.
  local last = pcall('GET', KEYS[2])
  if type(last) == 'table' and sub(last.err, 1, 9) ~= 'WRONGTYPE' then return last end
  return take(KEYS[1], KEYS[2], last, ARGV[1], ARGV[2], ARGV[3], ARGV[4])
end
local seen, answers = call('MGET', unpack(KEYS, count + 1)), {}
local alike, record, ttl, wish = #ARGV == count + 3, ARGV[count + 1], ARGV[count + 2], ARGV[count + 3]
-- By far the most common: nobody waits or may have to, and the last token is of this hour. It is what `take` does, in short.
local rest = alike and wish == '' and #ttl <= 7 and now_text .. ':' .. record
for i = 1, count do
  local lock, fence, last = KEYS[i], KEYS[count + i], seen[i]
  local number = rest and last and tonumber(last)
  local set = number and number < now and number >= hour and pcall('SET', lock, ARGV[i] .. rest, 'NX', 'PX', ttl)
  if set and not set.err then
    set = pcall('SET', fence, now_text, 'KEEPTTL')
    answers[i] = now
    if set.err then
      call('DEL', lock)
      answers[i] = set
    end
  else
    if not alike then record, ttl, wish = ARGV[count + i], ARGV[2 * count + i], ARGV[3 * count + i] end
    answers[i] = take(lock, fence, last, ARGV[i], record, ttl, wish)
  end
end
return answers
